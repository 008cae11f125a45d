"""RL's step-wise objective, x_T from the prior and each step's variance the base's, is largest where each step has the
mean of the target's own kernel (Gaussian prior, quadratic reward). The chain's end tends to the target with the number
of steps where x_T is independent of x_0. DPOK's updates rest elsewhere: at half the control of the target at alpha/2.

DPOK's gradient of the KL holds the law of the states fixed, so that no step answers for the KL that it causes later.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dbtheory import QuadraticReward, VPLinear
from dbtheory.metrics import gaussian_w2
from dbtheory.mixture import GaussianMixture
from dbtheory.steps import ddpm_step, posterior_gain, posterior_variance
from dbtheory.tilt import tilt
from proofs_check.claim import Row
from proofs_check.problems import random_problems

SOURCE = "paper eq. 4; Fan et al. 2023 (DPOK); MATH.md 10"
SCHEDULE = VPLinear()
LATE = 0.35  # a(t) = 0.53 there: a start that tells of x_0


@dataclass(frozen=True)
class Chain:
    """Steps `N(matrices[k] x + shifts[k], noises[k])` from `N(mean, covariance)` on, noise to data."""

    mean: Tensor
    covariance: Tensor
    matrices: Tensor
    shifts: Tensor
    noises: Tensor

    @property
    def laws(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and covariance of every state; the data's last."""
        laws = [(self.mean, self.covariance)]
        for a, b, noise in zip(self.matrices, self.shifts, self.noises, strict=True):
            mean, covariance = laws[-1]
            laws.append((a @ mean + b, a @ covariance @ a.T + noise))
        return laws


def check() -> Iterator[Row]:
    yield from _optima()
    prior, reward, alpha = example()
    target = tilt(prior, reward, alpha)
    counts = (25, 50, 100, 200)
    bases = [kernels(prior, prior, steps) for steps in counts]
    best = [_distance(optimum(base, reward, alpha), target) for base in bases]
    order = -np.polyfit(np.log(counts), np.log(best), 1)[0]
    yield Row(
        "the optimum's end against the target, 25 to 200 steps: |order of W2 in 1/steps - 1|", abs(order - 1), 0.05
    )
    late = kernels(prior, prior, 200, LATE)
    yield Row(
        f"control: x_T kept at t = {LATE}, where it tells of x_0: W2 of the end to the target, 200 steps",
        _distance(optimum(late, reward, alpha), target), 0.05, ">=",
    )  # fmt: skip
    rests = [optimum(base, reward, alpha, later_kl=False) for base in bases]
    sharp = tilt(prior, reward, alpha / 2)
    halves = [_halfway(base, kernels(sharp, prior, steps)) for base, steps in zip(bases, counts, strict=True)]
    apart = [gaussian_w2(*rest.laws[-1], *half.laws[-1]) for rest, half in zip(rests, halves, strict=True)]
    order = -np.polyfit(np.log(counts), np.log(apart), 1)[0]
    yield Row("DPOK's end against DB-KLA's at 1/2 from alpha/2: |order of W2 in 1/steps - 1|", abs(order - 1), 0.1)
    yield Row("... and their W2 at 200 steps", apart[-1], 0.005)
    yield Row("DPOK's end against the target: W2 at 200 steps", _distance(rests[-1], target), 0.1, ">=")


def _optima() -> Iterator[Row]:
    apart, best_slopes, rest_slopes, controls = [], [], [], []
    for index, problem in enumerate(random_problems(12, (1, 2), seed=8, components=1)):
        prior, reward, alpha = problem.prior, problem.rewards[0], problem.alpha
        steps, first = (1, 3, 10)[index % 3], (1.0, LATE)[index % 2]
        base = kernels(prior, prior, steps, first)
        target = kernels(tilt(prior, reward, alpha), prior, steps, first)
        best, rest = (optimum(base, reward, alpha, later_kl=later) for later in (True, False))
        apart.append(max(_gap(best.matrices, target.matrices), _gap(best.shifts, target.shifts)))
        start = slope(base, base, reward, alpha)
        best_slopes.append(slope(best, base, reward, alpha) / start)
        rest_slopes.append(slope(rest, base, reward, alpha, held=True) / start)
        if steps > 1:
            controls.append(slope(rest, base, reward, alpha) / start)
    yield Row(
        "the optimum's means against the target's kernels', 12 random problems of 1, 3, 10 steps", max(apart), 1e-9
    )
    yield Row("the objective's gradient at the optimum, relative to that at the base", max(best_slopes), 1e-9)
    yield Row("DPOK's expected update at its resting point, relative to that at the base", max(rest_slopes), 1e-9)
    yield Row("control: the objective's gradient at the resting point of 3 or 10 steps", min(controls), 1e-2, ">=")


def example() -> tuple[GaussianMixture, QuadraticReward, float]:
    """The table of MATH.md 10: N(0.3, 1), reward `x - x^2/4`, alpha 1/2; the target is N(1.15, 0.5)."""
    one = torch.ones(1, dtype=torch.float64)
    return GaussianMixture(one, 0.3 * one[:, None], one[:, None, None]), QuadraticReward(one[:, None] / 2, one), 0.5


def kernels(law: GaussianMixture, start: GaussianMixture, steps: int, first: float = 1.0) -> Chain:
    """The exact kernels of a Gaussian law from time `first` to 0 in equal steps, begun from another's law there."""
    d = law.dim
    points = torch.cat([torch.zeros(1, d), torch.eye(d)]).to(law.means)
    parts = []
    for t, t_next in pairwise(torch.linspace(first, 0, steps + 1, dtype=torch.float64)):
        posterior = law.posterior(SCHEDULE, points, t)
        values = ddpm_step(points, posterior.mean, t, t_next, 0 * points, SCHEDULE)
        own = posterior_variance(SCHEDULE, t, t_next) * torch.eye(d).to(points)
        noise = own + posterior_gain(SCHEDULE, t, t_next) ** 2 * posterior.covariance[0]
        parts.append(((values[1:] - values[0]).T, values[0], noise))
    noised = start.noised(SCHEDULE, first)
    return Chain(noised.mean, noised.covariance, *(torch.stack(part) for part in zip(*parts, strict=True)))


def optimum(base: Chain, reward: QuadraticReward, alpha: float, *, later_kl: bool = True) -> Chain:
    """The means that are best at the base's variances, backwards from the reward (MATH.md 10).

    `later_kl=False`: each step weighs its own KL against the reward alone, which is where DPOK rests.
    """
    curvature, gradient, parts = reward.Q, reward.b, []
    for a, b, noise in reversed(list(zip(base.matrices, base.shifts, base.noises, strict=True))):
        shrink = torch.linalg.inv(torch.eye(len(b)).to(b) + noise @ curvature / alpha)
        matrix, shift = shrink @ a, shrink @ (b + noise @ gradient / alpha)
        parts.append((matrix, shift))
        left, at = (a, shift) if later_kl else (matrix, shift)
        gradient, curvature = left.T @ (gradient - curvature @ at), left.T @ curvature @ matrix
    matrices, shifts = (torch.stack(part) for part in zip(*reversed(parts), strict=True))
    return replace(base, matrices=matrices, shifts=shifts)


def slope(chain: Chain, base: Chain, reward: QuadraticReward, alpha: float, *, held: bool = False) -> float:
    """The largest derivative of `E r(x_0) - alpha sum_k E KL` by a number of the chain's means, by exact moments.

    `held`: the KL's expectation keeps the law of the states, as in DPOK's update.
    """
    leaves = chain.matrices.clone().requires_grad_(), chain.shifts.clone().requires_grad_()
    moved = replace(chain, matrices=leaves[0], shifts=leaves[1])
    mean, covariance = moved.laws[-1]
    value = reward.b @ mean - mean @ reward.Q @ mean / 2 - (reward.Q @ covariance).trace() / 2
    for k, (mean, covariance) in enumerate((chain if held else moved).laws[:-1]):
        a, b = moved.matrices[k] - base.matrices[k], moved.shifts[k] - base.shifts[k]
        second = a @ covariance @ a.T + torch.outer(a @ mean + b, a @ mean + b)
        value = value - alpha / 2 * torch.linalg.solve(base.noises[k], second).trace()
    return max(float(part.abs().max()) for part in torch.autograd.grad(value, leaves))


def _halfway(base: Chain, sharp: Chain) -> Chain:
    """DB-KLA at lambda = 1/2: the mean of the two predictions, at the base's variances."""
    return replace(base, matrices=(base.matrices + sharp.matrices) / 2, shifts=(base.shifts + sharp.shifts) / 2)


def _distance(chain: Chain, target: GaussianMixture) -> float:
    return gaussian_w2(*chain.laws[-1], target.mean, target.covariance)


def _gap(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


def table(counts: Sequence[int] = (1, 3, 10, 50, 200), first: float = 1.0) -> Iterator[str]:
    """The rows of MATH.md 10: mean, variance and KL to the target of the optimum's and of DPOK's end."""
    prior, reward, alpha = example()
    target = tilt(prior, reward, alpha)
    for steps in counts:
        base = kernels(prior, prior, steps, first)
        cells = [str(steps)]
        for later in (True, False):
            mean, variance = (float(part) for part in optimum(base, reward, alpha, later_kl=later).laws[-1])
            ratio = variance / float(target.covariance)
            kl = (ratio - 1 - np.log(ratio) + (mean - float(target.mean)) ** 2 / float(target.covariance)) / 2
            cells += [f"{mean:.4f}", f"{variance:.4f}", f"{kl:.5f}"]
        yield "| " + " | ".join(cells) + " |"
