"""Random alignment problems for hypothesis: a prior, rewards, a preference, and points at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from dbtheory.mixture import GaussianMixture
from dbtheory.reward import QuadraticReward
from dbtheory.schedule import VE, NoiseSchedule, RectifiedFlow, VPCosine, VPDiscrete, VPLinear

SCHEDULES: tuple[NoiseSchedule, ...] = (VPLinear(), VPCosine(), VPDiscrete(), VE(), RectifiedFlow())

# The same problems every time. No phase "explain": it traces every line, which triples the time.
two_hundred = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)

# Components have standard deviations in [0.4, 1.2], so precisions of at least 0.69: rewards whose Q/alpha
# stays above -0.3, scaled by at most MAX_KL_SCALE, always have a target.
VARIANCES = (0.16, 1.44)
LOWEST_CURVATURE = -0.3
MAX_KL_SCALE = 2.0


@dataclass(frozen=True)
class Problem:
    """A prior, rewards with simplex weights, `alpha`, a KL scale, and points `x` (n, d) at time `t`."""

    prior: GaussianMixture
    rewards: Sequence[QuadraticReward]
    weights: Sequence[float]
    alpha: float
    kl_scale: float
    schedule: NoiseSchedule
    x: Tensor
    t: float

    @property
    def blended_reward(self) -> QuadraticReward:
        return sum(weight * reward for weight, reward in zip(self.weights, self.rewards, strict=True))


def uniform(low: float, high: float, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def symmetric(count: int, eigenvalues: Tensor, generator: torch.Generator) -> Tensor:
    """Symmetric matrices (count, d, d) with these eigenvalues (count, d) and random axes."""
    dim = eigenvalues.shape[-1]
    axes, _ = torch.linalg.qr(normal((count, dim, dim), generator))
    return (axes * eigenvalues.unsqueeze(-2)) @ axes.mT


def random_mixture(components: int, dim: int, generator: torch.Generator) -> GaussianMixture:
    weights = uniform(0.2, 1.0, (components,), generator)
    spread = uniform(*VARIANCES, (components, dim), generator)
    return GaussianMixture(
        weights / weights.sum(),
        2 * normal((components, dim), generator),
        symmetric(components, spread, generator),
    )


def random_reward(dim: int, alpha: float, generator: torch.Generator) -> QuadraticReward:
    """A quadratic reward, often indefinite, whose tilt exists for every prior of `random_mixture`."""
    curvature = uniform(LOWEST_CURVATURE * alpha, 2.0, (1, dim), generator)
    return QuadraticReward(symmetric(1, curvature, generator)[0], normal((dim,), generator), 0.7)


@st.composite
def problems(draw: st.DrawFn, max_dim: int = 3, points: int = 5) -> Problem:
    """Up to three components and two or three rewards; `alpha` in [0.1, 2], times from 0.01 up."""
    dim = draw(st.integers(1, max_dim), label="dim")
    components = draw(st.integers(1, 3), label="components")
    count = draw(st.integers(2, 3), label="rewards")
    schedule = draw(st.sampled_from(SCHEDULES), label="schedule")
    alpha = 10 ** draw(st.floats(-1, 0.3), label="log10 alpha")
    kl_scale = draw(st.floats(0.05, MAX_KL_SCALE), label="kl_scale")
    t = draw(st.floats(0.01, schedule.t_start), label="t")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1), label="seed"))

    prior = random_mixture(components, dim, generator)
    rewards = [random_reward(dim, alpha, generator) for _ in range(count)]
    weights = uniform(0.0, 1.0, (count,), generator)
    x = 1.3 * prior.noised(schedule, t).sample(points, generator)
    return Problem(prior, rewards, (weights / weights.sum()).tolist(), alpha, kl_scale, schedule, x, t)
