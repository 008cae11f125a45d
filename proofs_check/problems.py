"""Random alignment problems for the claims: a prior, quadratic rewards, a preference, and points at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from dbtheory import VE, GaussianMixture, QuadraticReward, RectifiedFlow, VPLinear, jensen_gap
from dbtheory.expansion import reward_cumulants
from dbtheory.law import Law
from dbtheory.reward import RBFReward, Reward, TanhReward
from dbtheory.schedule import NoiseSchedule
from proofs_check.claim import Row

ROUNDING = 1e-12  # of the gap, next to the data where it vanishes
Arguments = tuple[GaussianMixture, Reward, float, NoiseSchedule, Tensor, float]
SCHEDULES: tuple[NoiseSchedule, ...] = (VPLinear(), VE(), RectifiedFlow())


@dataclass(frozen=True)
class Problem:
    """A prior, rewards with simplex weights `w`, `alpha`, and points `x` (n, d) at the time `t`."""

    prior: GaussianMixture
    rewards: tuple[QuadraticReward, ...]
    w: tuple[float, ...]
    alpha: float
    schedule: NoiseSchedule
    x: Tensor
    t: float

    @property
    def combined(self) -> QuadraticReward:
        """`r(w) = sum_i w_i r_i`."""
        return reduce(add, (w * reward for w, reward in zip(self.w, self.rewards, strict=True)))

    @property
    def named(self) -> dict[str, QuadraticReward]:
        """The rewards as "r0", "r1", ..."""
        return {f"r{i}": reward for i, reward in enumerate(self.rewards)}

    def arguments(self, reward: Reward | None = None, alpha: float | None = None) -> Arguments:
        """What controls, gaps and bounds take; the combined reward and the problem's alpha unless given."""
        chosen = self.combined if reward is None else reward
        return self.prior, chosen, self.alpha if alpha is None else alpha, self.schedule, self.x, self.t


def random_problems(
    count: int,
    dims: tuple[int, ...],
    seed: int,
    *,
    points: int = 5,
    rewards: int = 2,
    components: int = 3,
    lowest_t: float = 0.01,
) -> Iterator[Problem]:
    """`count` problems; schedules and dimensions take turns, alpha is log-uniform in [0.1, 2].

    Components have standard deviations in [0.4, 1.2]. Curvatures of rewards over alpha stay above -0.3, so that
    targets exist, also for a KL scale up to 2. Points are drawn 1.3 times as wide as the noised prior.
    """
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        schedule, dim = SCHEDULES[index % len(SCHEDULES)], dims[(index // len(SCHEDULES)) % len(dims)]
        alpha = 10 ** float(_uniform(-1.0, 0.3, (), generator))
        t = float(_uniform(lowest_t, schedule.t_start, (), generator))
        weights, w = (_uniform(0.2, 1.0, (k,), generator) for k in (components, rewards))
        spread = _uniform(0.16, 1.44, (components, dim), generator)
        covariances = _symmetric(spread, generator)
        means = 2 * torch.randn(components, dim, generator=generator, dtype=torch.float64)
        prior = GaussianMixture(weights / weights.sum(), means, covariances)
        curvatures = _symmetric(_uniform(-0.3 * alpha, 2.0, (rewards, dim), generator), generator)
        slopes = torch.randn(rewards, dim, generator=generator, dtype=torch.float64)
        terms = tuple(QuadraticReward(q, b, 0.7) for q, b in zip(curvatures, slopes, strict=True))
        x = 1.3 * prior.noised(schedule, t).sample(points, generator)
        yield Problem(prior, terms, tuple((w / w.sum()).tolist()), alpha, schedule, x, t)


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def _symmetric(eigenvalues: Tensor, generator: torch.Generator) -> Tensor:
    """Symmetric matrices (k, d, d) with these eigenvalues (k, d) and random axes."""
    k, dim = eigenvalues.shape
    axes, _ = torch.linalg.qr(torch.randn(k, dim, dim, generator=generator, dtype=torch.float64))
    return (axes * eigenvalues.unsqueeze(-2)) @ axes.mT


def bounded_reward(problem: Problem, generator: torch.Generator) -> Reward:
    """Two tanh steps or two bumps of size `alpha`, where the prior's components lie: R = reward/alpha is of order 1."""
    dim, means = problem.prior.dim, problem.prior.means[:2]
    amplitudes = 2 * problem.alpha * torch.randn(2, generator=generator, dtype=torch.float64)
    if bool(torch.rand((), generator=generator) < 0.5):
        return RBFReward(means, _uniform(0.7, 2.0, (2,), generator), amplitudes)
    slopes = torch.randn(2, dim, generator=generator, dtype=torch.float64)
    return TanhReward(slopes, -(slopes * means).sum(-1), amplitudes)


def reference_gap(problem: Problem, reward: Reward) -> Tensor:
    """The Jensen gap (n, d): closed where the reward is quadratic, else on a lattice (2,048 nodes in 1-D)."""
    route = None if isinstance(reward, QuadraticReward) else "grid"
    return jensen_gap(*problem.arguments(reward), route=route)


def reverse_drift(problem: Problem, law: Law) -> Tensor:
    """`f x - g^2 score` (n, d) with the score of this law after noising (paper eq. 2 and 5)."""
    f, g2 = problem.schedule.drift_rate(problem.t), problem.schedule.diffusion_squared(problem.t)
    return f * problem.x - g2 * law.noised(problem.schedule, problem.t).score(problem.x)


def largest_deviation(problem: Problem, rewards: Iterable[Reward], alpha: float = 1.0) -> float:
    """The largest sd(r/alpha | x_t = x) of these rewards at the problem's points."""
    return float(max(reward_cumulants(*problem.arguments(r, alpha), order=2)[1].max() for r in rewards)) ** 0.5


def violations(what: str, gap: Tensor, bound: Tensor, problems: int) -> Row:
    """How often |gap| exceeds its bound by more than rounding, and quantiles of bound/|gap| over gaps above it."""
    ratio = quantiles((bound / gap)[gap > ROUNDING])
    found = int((gap > (1 + 1e-9) * bound + ROUNDING).sum())
    return Row(f"violations {what}, {len(gap)} points of {problems} problems (bound/|gap|: {ratio})", found, 0)


def quantiles(values: Tensor) -> str:
    """The least value and the 10, 50 and 90 % quantiles, in words."""
    ranks = torch.tensor([0.1, 0.5, 0.9], dtype=values.dtype)
    low, median, high = values.quantile(ranks).tolist()
    return f"least {values.min().item():.3f}, median {median:.3g}, 10 %: {low:.3g}, 90 %: {high:.3g}"
