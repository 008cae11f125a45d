"""Classifier-free guidance breaks the premise of exact scores: guided experts, however exact, sample neither the
conditional target nor, for a guidance s other than 1, the density `p_u^(1-s) p_c^s e^(r/alpha)` whose score they seem
to follow; and it moves every blend, the further the larger s.

It is DB-KLA once more, with the reward `log p(c|x)` and lambda = s, so that the Feynman-Kac correction applies to it.
Every distance is a sliced W2 to independent draws, beside that of two sets of draws (the floor).
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
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
from dbtheory.metrics import sliced_w2
from dbtheory.sampler import time_grid
from proofs_check.claim import Row

SOURCE = "beyond the paper, whose images are guided; MATH.md 1 and 9"
SAMPLES, STEPS = 4000, 100
GUIDANCE = (1.0, 2.0, 4.0, 7.5)
ONE = torch.ones(1, 1, dtype=torch.float64)


def check() -> Iterator[Row]:
    yield from _ring_of_six()
    yield _guidance_is_kla()
    yield from _gaussians()


def _ring_of_six() -> Iterator[Row]:
    """The class prefers the modes to one side, softly: between 0.14 and 0.86 of each belong to it."""
    toy = toys.get("ring-of-six")
    prior = toy.prior
    assert isinstance(prior, GaussianMixture)
    towards = torch.tensor([0.825, 0.565], dtype=torch.float64)
    belongs = prior.weights * torch.sigmoid(2 * prior.means @ towards / 2.5)
    conditional = GaussianMixture(belongs / belongs.sum(), prior.means, prior.covariances)
    aligned, free = (ExactExperts(law, toy.rewards, toy.alpha, toy.schedule) for law in (conditional, prior))
    (first, reward), (second, _) = toy.rewards.items()
    one, both = Preference({first: 1, second: 0}), Preference({first: 0.5, second: 0.5})

    target = tilt(conditional, reward, toy.alpha)
    floor = _floor(target)
    guided = {s: GuidedExperts(aligned, free, s) for s in GUIDANCE}
    moved = {s: _distance(_samples(experts, one), target) for s, experts in guided.items()}
    yield Row(
        f"one expert, s = 1: distance to the tilted conditional target (floor {floor:.3f})", moved[1.0], 2 * floor
    )
    for before, s in pairwise(GUIDANCE):
        yield Row(
            f"one expert, s = {s:g}: that distance, against the one at s = {before:g}", moved[s], moved[before], ">="
        )
    s = GUIDANCE[-1]
    formal = guided_target(target, tilt(prior, reward, toy.alpha), s, [-5.0, -5.0], [5.0, 5.0], [161, 161])
    yield Row(
        f"one expert, s = {s:g}: distance to p_u^(1-s) p_c^s e^(r/alpha), against two floors",
        _distance(_samples(guided[s], one), formal),
        2 * _floor(formal),
        ">=",
    )
    unguided = _samples(guided[1.0], both)
    blends = {s: sliced_w2(_samples(experts, both), unguided) for s, experts in guided.items()}
    yield Row("DB-MPA, w = 0.5, s = 1: distance to the unguided blend under the same noise", blends[1.0], 0)
    for before, s in pairwise(GUIDANCE):
        yield Row(
            f"DB-MPA, s = {s:g}: that distance, against the one at s = {before:g}", blends[s], blends[before], ">="
        )


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
        f"Gaussians, s = 4: corrected samples' distance to it, against a third of {plain:.3f}", corrected, plain / 3
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


def _samples(experts: Experts, preference: Preference, correct: FeynmanKac | None = None) -> Tensor:
    grid, generator = time_grid(experts.schedule, STEPS, power=2.0), torch.Generator().manual_seed(1)
    blend = MeanBlend(preference)
    return sample(experts, blend, SAMPLES, STEPS, generator, method="euler", grid=grid, correct=correct)


def _distance(x: Tensor, law: Law) -> float:
    return sliced_w2(x, law.sample(SAMPLES, torch.Generator().manual_seed(2)))


def _floor(law: Law) -> float:
    """The mean distance of independent draws to those that samples are measured against."""
    draws = [law.sample(SAMPLES, torch.Generator().manual_seed(seed)) for seed in (3, 4, 5, 6)]
    return sum(_distance(draw, law) for draw in draws) / len(draws)
