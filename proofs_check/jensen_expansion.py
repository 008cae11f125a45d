"""The Jensen gap is the tail of R's cumulant series, `gap = sum_{n >= 2} grad kappa_n(R | x_t)/n!` with `R = r/alpha`:
stopped after n terms it misses the gap by order n + 1 in 1/alpha, and it converges where the nearest complex zero of
`E[e^(zR) | x_t]` lies beyond |z| = 1, diverges where it lies below: on the ring of six at its own alpha, at most
points.

Random mixtures and quadratic rewards, three schedules. The gap itself comes from the tilted posterior.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dbtheory import VE, GaussianMixture, LinearReward, VPLinear, jensen_gap
from dbtheory.expansion import convergence_radius, gap_series
from dbtheory.schedule import NoiseSchedule
from proofs_check.claim import Row
from proofs_check.problems import Problem, largest_deviation, random_problems
from toys import get

SOURCE = "paper eq. 8 (the Jensen approximation); MATH.md 3"
TERMS = 40


def check() -> Iterator[Row]:
    yield from _orders()
    yield from _convergence()
    yield _radius_in_closed_form()
    yield _radius_of_a_rare_component()
    yield _divergence_on_the_ring()


def _orders() -> Iterator[Row]:
    """Two alphas a factor 2 apart, in units of sd(R): the error falls by 2^(n + 1)."""
    # the smaller sd(R), the purer the order, until what is left of the gap is rounding
    for order, size, tolerance in ((1, 0.01, 0.1), (2, 0.01, 0.1), (3, 0.01, 0.1), (4, 0.08, 0.3)):
        problems = random_problems(30, (1, 2), seed=0, lowest_t=0.1)
        fitted = [math.log2(_remainder(p, 2 * size, order) / _remainder(p, size, order)) for p in problems]
        worst = max(abs(slope - order - 1) for slope in fitted)
        yield Row(f"|fitted order in 1/alpha - {order + 1}|, terms up to n = {order}", worst, tolerance)


def _remainder(problem: Problem, size: float, order: int) -> float:
    """Norm of the gap less its terms up to `order`, at the alpha where the largest sd(R | x) is `size`."""
    arguments = problem.arguments(alpha=largest_deviation(problem, [problem.combined]) / size)
    # the term of order 1 is the Jensen control, which the gap leaves out
    terms = gap_series(*arguments, order=order) if order > 1 else torch.zeros(1)
    return float((jensen_gap(*arguments) - terms.sum(0)).norm())


def _convergence() -> Iterator[Row]:
    problems = random_problems(30, (1,), seed=1, lowest_t=0.1, points=8)
    radii, errors = (torch.cat(parts) for parts in zip(*map(_series, problems), strict=True))
    inside, outside = radii > 1.25, radii < 0.8
    said = f"relative error after {TERMS} terms"
    yield Row(f"largest {said}, {int(inside.sum())} points of radius > 1.25", float(errors[inside].max()), 1e-2)
    yield Row(f"smallest {said}, {int(outside.sum())} points of radius < 0.8", float(errors[outside].min()), 10.0, ">=")


def _series(problem: Problem) -> tuple[Tensor, Tensor]:
    """At each point the radius, and the relative error of the partial sum."""
    # At the alpha where sd(R | x) is at most 3: with more, high moments drown the cumulants in rounding.
    arguments = problem.arguments(alpha=largest_deviation(problem, [problem.combined]) / 3)
    gap, terms = jensen_gap(*arguments), gap_series(*arguments, order=TERMS)
    return convergence_radius(*arguments), (terms.sum(0) - gap).norm(dim=-1) / gap.norm(dim=-1)


def _radius_in_closed_form() -> Row:
    half = torch.full((2,), 0.5, dtype=torch.float64)
    means, covariances = torch.tensor([[-1.5], [1.5]]).double(), torch.full((2, 1, 1), 0.25).double()
    x = torch.linspace(-2, 2, 9).double().unsqueeze(-1)
    error = _radius_error(GaussianMixture(half, means, covariances), 0.5, VPLinear(), x, 0.5)
    return Row("relative error of the radius, two modes and a linear reward", error, 1e-8)


def _radius_of_a_rare_component() -> Row:
    """The farther a mode the rarer it may be and still decide: where the series seems to be that of one Gaussian."""
    x, errors = torch.zeros(1, 1, dtype=torch.float64), []
    for weight, separation, deviation in ((1e-12, 30.0, 0.05), (1e-9, 25.0, 0.05), (1e-6, 18.0, 0.1)):
        weights = torch.tensor([1 - weight, weight], dtype=torch.float64)
        means = torch.tensor([[0.0], [separation]], dtype=torch.float64)
        prior = GaussianMixture(weights, means, torch.full((2, 1, 1), deviation**2, dtype=torch.float64))
        errors.append(_radius_error(prior, 1.0, VE(), x, 1.0))
    what = "relative error of the radius, linear reward, the second mode far away with weight 1e-12, 1e-9 and 1e-6"
    return Row(what, max(errors), 1e-8)


def _radius_error(prior: GaussianMixture, alpha: float, schedule: NoiseSchedule, x: Tensor, t: float) -> float:
    """Largest relative error for two components of one width and the reward x: `E[e^(zR) | x]` is
    `w_1 e^(z r_1) + w_2 e^(z r_2)` times `e^(c z^2)`, with zeros at `(log(w_1/w_2) + i pi (2k + 1))/(r_2 - r_1)`."""
    posterior = prior.posterior(schedule, x, t)
    distance = (posterior.means[:, 1, 0] - posterior.means[:, 0, 0]) / alpha
    log_odds = posterior.log_weights.diff().squeeze(-1)
    exact = torch.hypot(log_odds, torch.full_like(log_odds, torch.pi)) / distance
    radius = convergence_radius(prior, LinearReward(torch.ones(1).double()), alpha, schedule, x, t)
    return float((radius / exact - 1).abs().max())


def _divergence_on_the_ring() -> Row:
    ring, t = get("ring-of-six"), 0.3
    prior = ring.prior
    assert isinstance(prior, GaussianMixture)
    x = prior.noised(ring.schedule, t).sample(64, torch.Generator().manual_seed(0))
    radius = convergence_radius(prior, ring.rewards["east"], ring.alpha, ring.schedule, x, t)
    share = float((radius < 1).double().mean())
    return Row("share of points of the ring of six, alpha = 1, t = 0.3, where the series diverges", share, 0.5, ">=")
