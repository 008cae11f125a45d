"""In the low-discrepancy order, expert 0 at step k iff `floor((k+1) w + U) > floor(k w + U)` and nested for more
experts, each step keeps the exact law of DB-MPA-LS and every prefix of a trajectory holds each expert in proportion, so
that a sample stays far closer to DB-MPA's own path under the same noise than with independent draws.

The paper draws independently (Proposition 2); this order is ours. Both cost one evaluation a step. Sums of weight minus
draw stay bounded here, so by summation by parts the distance to the path is of strong order 1 in the step; independent
draws leave order 1/2. The gain grows accordingly with the number of steps, and falls with w (1 - w).

Two families of statistical rows, each with a false-alarm level of 1e-5, Bonferroni-corrected. Laws: 30 tests (6 steps
of 5 laws), chi-square quantiles at 1e-5/30. Batches: 6 one-sided tests (3 rows, 2 coordinates); the variance of 64
means over that of independent samples is chi-square with 63 degrees of freedom, over 63: the bound is the root of its
quantile at 1e-5/6. Distances and orders of paths are measured on one draw and carry no level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor

import toys
from dbtheory import (
    ExactExperts,
    GaussianMixture,
    MeanBlend,
    Preference,
    QuadraticReward,
    SampledBlend,
    VPLinear,
    sample,
)
from dbtheory.assignment import changing_rotation_choice, independent_choice, rotation_choice
from proofs_check.claim import Row

SOURCE = "extends paper Proposition 2; MATH.md 6"
FALSE_ALARM = 1e-5
LAWS = ((0.3, 0.7), (1 / 3, 2 / 3), (0.5, 0.3, 0.2), (0.1, 0.2, 0.3, 0.4), (0.02, 0.9, 0.05, 0.03))


def check() -> Iterator[Row]:
    yield from _laws()
    yield from _proportions()
    yield from _paths()
    yield from _batches()


def _laws() -> Iterator[Row]:
    """Pearson's chi-square over its critical value, corrected for the number of tests."""
    steps, phase = (0, 1, 2, 7, 49, 199), _uniform(20_000, 0)
    level = FALSE_ALARM / (len(steps) * len(LAWS))
    right = [_chi_square(rotation_choice(law, k, phase), law, level) for law in LAWS for k in steps]
    yield Row("law of each step's draw: largest chi-square over its critical value", max(right), 1.0)
    off = [(law, (law[0] + 0.04, *law[1:-1], law[-1] - 0.04)) for law in LAWS if law[-1] > 0.04]
    wrong = [max(_chi_square(rotation_choice(law, k, phase), other, level) for k in steps) for law, other in off]
    what = "negative control: largest chi-square of a law's steps over its critical value for probabilities off by 0.04"
    yield Row(f"{what}, smallest over the laws", min(wrong), 1.0, ">=")


def _proportions() -> Iterator[Row]:
    """Counts after each of 200 steps, for 300 samples: distance to `k w`, over the bound of the nested rotation."""
    two, more = ([_worst(rotation_choice, law) for law in LAWS if (len(law) == 2) is pair] for pair in (True, False))
    yield Row("two experts: largest |count - k w| over all prefixes", max(two), 1.0)
    yield Row("three and four experts: largest |count - k w| over all prefixes, over the nested bound", max(more), 1.0)
    yield Row("two experts, new weights at every step: largest |count - sum of weights|", _worst_changing(), 1.0)
    independent = min(_worst(independent_choice, law) for law in LAWS)
    what = "negative control: independent draws, largest |count - k w| over the bound for the low-discrepancy order"
    yield Row(f"{what}, smallest over the laws", independent, 1.0, ">=")


def _paths() -> Iterator[Row]:
    """Same start, noise and phase; root mean square distance to MPA's samples at data."""
    ring, preference = _ring(), Preference({"east": 0.3, "north": 0.7})
    for steps, n in ((25, 4000), (50, 4000), (200, 1000)):
        ratio = _ratio(ring, preference, steps, n)
        yield Row(f"ring of six, {steps} steps: distance to MPA, low-discrepancy over iid", ratio, 1 / 3)
    # iid's error shrinks with w (1 - w), the rotation's does not: the gain of 3 needs more steps at small weights
    ratio = _ratio(ring, Preference({"east": 0.1, "north": 0.9}), 25, 4000)
    what = "ring of six, w = 0.1, 25 steps: the gain is below 3, distance to MPA, low-discrepancy over iid"
    yield Row(what, ratio, 1 / 3, ">=")
    yield Row(
        "strong order towards MPA's path, Gaussian experts: low-discrepancy", _order("low-discrepancy"), 0.9, ">="
    )
    yield Row("strong order towards MPA's path, Gaussian experts: iid", _order("iid"), 0.6)


def _batches() -> Iterator[Row]:
    """One draw for a batch: 64 batches of 64 samples, and the spread of a batch's mean."""
    # 3 rows, 2 coordinates: above this the means of 64 batches vary more than those of independent samples
    critical = float(stats.chi2.isf(FALSE_ALARM / 6, 63) / 63) ** 0.5
    what = "spread of a batch's mean over that of independent samples"
    yield Row(f"{what}: iid, a draw a sample", _spread("iid", False), critical)
    yield Row(f"{what}: low-discrepancy, a draw a sample", _spread("low-discrepancy", False), critical)
    yield Row(f"{what}: low-discrepancy, one draw a batch", _spread("low-discrepancy", True), critical)
    yield Row(f"negative control: {what}: iid, one draw a batch, which correlates it", _spread("iid", True), 2.0, ">=")


def _chi_square(draws: Tensor, law: Sequence[float], level: float) -> float:
    counts = np.bincount(draws.numpy(), minlength=len(law))
    statistic = stats.chisquare(counts, len(draws) * np.asarray(law)).statistic
    return float(statistic / stats.chi2.isf(level, len(law) - 1))


def _worst(choice: Callable[..., Tensor], law: Sequence[float], steps: int = 200) -> float:
    draws = torch.stack([choice(law, k, _uniform(300, 1)) for k in range(steps)])
    k = torch.arange(1, steps + 1, dtype=torch.float64).unsqueeze(-1)
    pairs = zip(law, _nested_bounds(law), strict=True)
    return max(float(((draws == i).cumsum(0) - k * w).abs().max()) / bound for i, (w, bound) in enumerate(pairs))


def _nested_bounds(law: Sequence[float]) -> list[float]:
    """A level errs by less than 1 in what it is given, and by its share of the error of what was left to it."""
    bounds, left, remaining = [], 0.0, 1.0
    for w in law[:-1]:
        share = w / remaining
        bounds.append(1 + share * left)
        left, remaining = 1 + (1 - share) * left, remaining - w
    return [*bounds, left]


def _worst_changing(steps: int = 100) -> float:
    w = 0.5 + 0.45 * torch.sin(torch.arange(steps, dtype=torch.float64) ** 2)
    law = torch.stack([w, 1 - w], -1).unsqueeze(1)
    draws = torch.stack([changing_rotation_choice(law[: k + 1], _uniform(300, 1)) for k in range(steps)])
    return float(((draws == 0).cumsum(0) - w.cumsum(0).unsqueeze(-1)).abs().max())


def _ratio(experts: ExactExperts, preference: Preference, steps: int, n: int) -> float:
    near, far = (_distance(experts, preference, steps, order, n) for order in ("low-discrepancy", "iid"))
    return near / far


def _distance(experts: ExactExperts, preference: Preference, steps: int, order: str, n: int) -> float:
    noise = torch.randn(steps, n, 2, generator=torch.Generator().manual_seed(steps), dtype=torch.float64)
    drawn, mean = (
        sample(experts, blender, n, steps, torch.Generator().manual_seed(0), noise=noise)
        for blender in (SampledBlend(preference, order), MeanBlend(preference))
    )
    return float((drawn - mean).square().sum(-1).mean().sqrt())


def _order(order: str) -> float:
    """Fitted to the distances at step counts that double."""
    errors = [_distance(_gaussians(), Preference({"a": 0.5, "b": 0.5}), steps, order, 500) for steps in (50, 100, 200)]
    return -float(np.polyfit(np.arange(len(errors)), np.log2(errors), 1)[0])


def _spread(order: str, shared: bool, size: int = 64, steps: int = 25) -> float:
    """Standard deviation of the means of 64 batches over its value for independent samples, the larger of two axes."""
    phase = _uniform(size * size, 2)
    phase = phase[:size].repeat_interleave(size) if shared else phase
    blend = SampledBlend(Preference({"east": 0.5, "north": 0.5}), order)
    x = sample(_ring(), blend, size * size, steps, torch.Generator().manual_seed(3), phase=phase)
    spread = x.reshape(size, size, 2).mean(1).std(0) / (x.std(0) / size**0.5)
    return float(spread.max())


def _ring() -> ExactExperts:
    toy = toys.get("ring-of-six")
    return ExactExperts(toy.prior, toy.rewards, toy.alpha, toy.schedule)


def _gaussians() -> ExactExperts:
    one, mean = torch.ones(1, dtype=torch.float64), torch.tensor([1.0, -0.5], dtype=torch.float64)
    covariance, slope = torch.tensor([[0.8, 0.3], [0.3, 0.4]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    prior = GaussianMixture(one, mean.unsqueeze(0), covariance.unsqueeze(0))
    rewards = {"a": QuadraticReward(covariance, slope[0]), "b": QuadraticReward(slope, -2 * slope[1])}
    return ExactExperts(prior, rewards, 1.0, VPLinear())


def _uniform(n: int, seed: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
