"""Classifier-free guidance breaks the premise of exact scores: guided experts, however exact, sample neither the
conditional target nor, for a guidance s other than 1, the density `p_u^(1-s) p_c^s e^(r/alpha)` whose score they seem
to follow; and it moves every blend, the further the larger s.

It is DB-KLA once more, with the reward `log p(c|x)` and lambda = s, so that the Feynman-Kac correction applies to it.
Distances are sliced W2 to independent draws; that of exact draws is the floor. Two rows are tests against it, with a
false-alarm level of 1e-5, Bonferroni-corrected over the two. The square of such a distance is for many draws a sum of
squares, or between modes of absolute values, of Gaussians. Of the sums with its mean and variance, estimated from 64
sets of draws, a single square has the heaviest tail: its quantile at 1e-5/2 is the critical value. Rows that compare
two guidances, or samples with and without the correction, carry no level; the Gaussians' laws are free of chance.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from scipy import stats
from torch import Tensor

import toys
from dbtheory import (
    ExactExperts,
    GaussianMixture,
    LinearReward,
    MeanBlend,
    Preference,
    QuadraticReward,
    VPLinear,
    sample,
    tilt,
)
from dbtheory.blend import Step
from dbtheory.correct import FeynmanKac
from dbtheory.experts import Experts
from dbtheory.guidance import GuidedExperts, guided_target
from dbtheory.law import Law
from dbtheory.metrics import SlicedW2, sliced_w2
from dbtheory.preference import BASE
from dbtheory.sampler import time_grid
from proofs_check.claim import Row

SOURCE = "beyond the paper, whose images are guided; MATH.md 1 and 9"
FALSE_ALARM, TESTS, SETS = 1e-5, 2, 64
SAMPLES, STEPS = 4000, 100
GUIDANCE = (1.0, 2.0, 4.0, 7.5)
ONE = torch.ones(1, 1, dtype=torch.float64)


def check() -> Iterator[Row]:
    yield from _one_expert()
    yield from _blend()
    yield _guidance_is_kla()
    yield from _gaussians()


def _one_expert() -> Iterator[Row]:
    aligned, free = _ring_of_six()
    _, first, second = aligned.names
    target, preference = aligned.targets[first], Preference({first: 1, second: 0})
    guided = {s: GuidedExperts(aligned, free, s) for s in GUIDANCE}
    moved = {s: _distance(_samples(experts, preference), target) for s, experts in guided.items()}
    said = "distance to the tilted conditional target"
    floor, critical = _floor(target, SAMPLES)
    yield Row(f"one expert, s = 1: {said} (floor {floor:.3f})", moved[1.0], critical)
    yield Row(f"negative control: one expert, s = 4: {said}", moved[4.0], critical, ">=")
    for before, s in pairwise(GUIDANCE):
        yield Row(f"one expert, s = {s:g}: {said}, against that at s = {before:g}", moved[s], moved[before], ">=")
    # so close to the guided law that the test needs twice the samples
    s, n = GUIDANCE[-1], 2 * SAMPLES
    formal = guided_target(target, free.targets[first], s, [-5.0, -5.0], [5.0, 5.0], [161, 161])
    floor, critical = _floor(formal, n)
    said = f"distance of {n} samples to p_u^(1-s) p_c^s e^(r/alpha) (floor {floor:.3f})"
    yield Row(f"one expert, s = {s:g}: {said}", _distance(_samples(guided[s], preference, n=n), formal), critical, ">=")


def _blend() -> Iterator[Row]:
    aligned, free = _ring_of_six()
    _, first, second = aligned.names
    preference = Preference({first: 0.5, second: 0.5})
    unguided = _samples(aligned, preference)
    guided = {s: _samples(GuidedExperts(aligned, free, s), preference) for s in GUIDANCE}
    moved = {s: sliced_w2(x, unguided) for s, x in guided.items()}
    said = "distance to the unguided blend under the same noise"
    yield Row(f"DB-MPA, w = 0.5, s = 1: {said}", moved[1.0], 0)
    for before, s in pairwise(GUIDANCE[1:]):
        what = f"DB-MPA, w = 0.5, s = {s:g}: {said}, against that at s = {before:g}"
        yield Row(what, moved[s], moved[before], ">=")
    toy = toys.get("ring-of-six")
    combined = 0.5 * toy.rewards[first] + 0.5 * toy.rewards[second]
    target = tilt(aligned.targets[BASE], combined, toy.alpha)
    off = {s: _distance(x, target) for s, x in guided.items()}
    # a little guidance may undo a part of DB's own error, which is the distance at s = 1
    for before, s in pairwise(GUIDANCE[1:]):
        yield Row(
            f"DB-MPA, w = 0.5, s = {s:g}: distance to the tilted conditional target, against that at s = {before:g} "
            f"({off[1.0]:.3f} unguided)",
            off[s],
            off[before],
            ">=",
        )


def _ring_of_six() -> tuple[ExactExperts, ExactExperts]:
    """Conditional and unconditional; the class prefers the modes to one side, softly: it has 0.14 to 0.86 of each."""
    toy = toys.get("ring-of-six")
    prior = toy.prior
    assert isinstance(prior, GaussianMixture)
    towards = torch.tensor([0.825, 0.565], dtype=torch.float64)
    belongs = prior.weights * torch.sigmoid(2 * prior.means @ towards / 2.5)
    conditional = GaussianMixture(belongs / belongs.sum(), prior.means, prior.covariances)
    aligned, free = (ExactExperts(law, toy.rewards, toy.alpha, toy.schedule) for law in (conditional, prior))
    return aligned, free


def _guidance_is_kla() -> Row:
    conditional, unconditional, both = _gaussian_experts()
    x, apart = torch.linspace(-4, 4, 33, dtype=torch.float64)[:, None], 0.0
    for s in GUIDANCE:
        for t in (0.05, 0.4, 0.9):
            step = Step(0, 1, t, 0.0, torch.zeros(len(x), dtype=torch.float64))
            guided = GuidedExperts(conditional, unconditional, s).predict(x, t, ["base"])[0]
            kla = MeanBlend(Preference({"class": 1.0}, s))(both, x, t, step)
            apart = max(apart, float((guided - kla).norm() / kla.norm()))
    return Row(
        "Gaussians: guided prediction against DB-KLA's with reward log p(c|x) and lambda = s, relative", apart, 1e-12
    )


def _gaussians() -> Iterator[Row]:
    """`p_u = N(0, 1)`, `p_c = N(1, 1/2)`: the formal density is `N(2s/(1+s), 1/(1+s))`, and all laws are known."""
    *_, both = _gaussian_experts()
    for s in GUIDANCE:
        formal = GaussianMixture(ONE[0], 2 * s / (1 + s) * ONE, ONE[None] / (1 + s))
        guided, finer = (_guided_gaussian(s, steps) for steps in (1000, 2000))
        distance = _gaussian_distance(finer, formal)
        yield Row(
            f"Gaussians, s = {s:g}: W2 of the guided law to the formal density (twice the steps move it by "
            f"{abs(distance - _gaussian_distance(guided, formal)):.1e})",
            distance,
            0.002 if s == 1 else 0.02,
            "<=" if s == 1 else ">=",
        )
    s = 4.0
    formal = GaussianMixture(ONE[0], 2 * s / (1 + s) * ONE, ONE[None] / (1 + s))
    blend = MeanBlend(Preference({"class": 1.0}, s))
    plain, corrected = (_distance(_samples(both, blend.preference, c), formal) for c in (None, FeynmanKac()))
    yield Row(
        "Gaussians, s = 4: corrected samples' distance to the formal density, against a third of that without the "
        f"correction, {plain:.3f}",
        corrected,
        plain / 3,
    )


def _gaussian_experts() -> tuple[ExactExperts, ExactExperts, ExactExperts]:
    """Conditional and unconditional base models, and both as one: `log p_c/p_u = -x^2/2 + 2x` plus a constant."""
    unconditional, conditional = (
        GaussianMixture(ONE[0], 0 * ONE, ONE[None]),
        GaussianMixture(ONE[0], ONE, 0.5 * ONE[None]),
    )
    none = {"none": LinearReward(0 * ONE[0])}
    sets = [ExactExperts(law, none, 1.0, VPLinear()) for law in (conditional, unconditional)]
    both = ExactExperts(unconditional, {"class": QuadraticReward(ONE, 2 * ONE[0])}, 1.0, VPLinear())
    return sets[0], sets[1], both


def _guided_gaussian(s: float, steps: int) -> tuple[float, float]:
    """Mean and variance of the guided reverse SDE at t = 0: its drift is affine, and the noised p_u is N(0, 1)."""
    schedule, mean, variance = VPLinear(), 0.0, 1.0
    for t, t_next in pairwise(time_grid(schedule, steps, power=2.0).tolist()):
        alpha, f, g2 = (float(part(t)) for part in (schedule.alpha, schedule.drift_rate, schedule.diffusion_squared))
        h = t - t_next
        precision = 1 / (0.5 * alpha**2 + 1 - alpha**2)
        slope, pull = -(1 - s) - s * precision, s * precision * alpha
        factor = 1 - (f - g2 * slope) * h
        mean, variance = factor * mean + g2 * pull * h, factor**2 * variance + g2 * h
    return mean, variance


def _gaussian_distance(moments: tuple[float, float], law: GaussianMixture) -> float:
    mean, variance = moments
    return math.hypot(mean - float(law.mean), variance**0.5 - float(law.covariance) ** 0.5)


def _samples(experts: Experts, preference: Preference, correct: FeynmanKac | None = None, n: int = SAMPLES) -> Tensor:
    grid, generator = time_grid(experts.schedule, STEPS, power=2.0), torch.Generator().manual_seed(1)
    blend = MeanBlend(preference)
    return sample(experts, blend, n, STEPS, generator, method="euler", grid=grid, correct=correct)


def _distance(x: Tensor, law: Law) -> float:
    return sliced_w2(x, _reference(law, len(x)))


def _reference(law: Law, n: int) -> Tensor:
    return law.sample(n, torch.Generator().manual_seed(2))


def _floor(law: Law, n: int) -> tuple[float, float]:
    """The mean distance of n exact draws to those that samples are measured against, and its critical value."""
    distance = SlicedW2(_reference(law, n))
    draws = [distance(law.sample(n, torch.Generator().manual_seed(3 + k))) for k in range(SETS)]
    squares = np.square(draws)
    above = (float(stats.chi2.isf(FALSE_ALARM / TESTS, 1)) - 1) / 2**0.5  # the mean, in standard deviations
    return float(np.mean(draws)), float(squares.mean() + above * squares.std(ddof=1)) ** 0.5
