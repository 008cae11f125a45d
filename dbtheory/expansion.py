"""The cumulant series of the Jensen gap, and where it converges (MATH.md 3).

`K(z, x) = log E[e^(zR) | x_t = x]`, with `R = reward/alpha` under the prior's posterior, generates R's cumulants:
`K = sum_k kappa_k z^k/k!`. Its gradient in x at z = 1 is the control, whose first term `grad kappa_1` is the Jensen
control; the rest is the gap. In z this is a power series, which converges at z = 1 where the nearest complex
singularity of K, a zero of `E[e^(zR) | x]` or a branch point, lies farther than 1. Since R is the reward over alpha,
halving alpha halves that distance: at every x without Gaussian R there is an alpha below which the series diverges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from dbtheory.conditional import Conditional
from dbtheory.control import chosen_route, default_order
from dbtheory.law import Law
from dbtheory.mixture import GaussianMixture
from dbtheory.quadratic_cumulants import QuadraticCumulants
from dbtheory.reward import Reward
from dbtheory.schedule import NoiseSchedule, Time
from dbtheory.tilt import Alpha, require_alpha, require_quadratic

SEARCH = 12.0  # how far singularities are looked for, in units of 1/sd(R),
TURNS = 5000.0  # at most so far that a component's phase turns at this rate, which takes 16,000 angles,
NEAR = 0.999  # and up to here on the way to the branch point
DOUBLINGS = 12  # of the radius, up to there
BISECTIONS = 12  # of the last doubling, to a relative 2.4e-4
STARTS, NEWTON_STEPS = 8, 10  # from there to the zero
ENTRIES = 128  # points x components x coordinates that are searched at a time


def reward_cumulants(
    prior: Law,
    reward: Reward,
    alpha: Alpha,
    schedule: NoiseSchedule,
    x: Tensor,
    t: Time,
    *,
    order: int = 4,
) -> Float[Tensor, "order n"]:
    """`kappa_1 .. kappa_order` of `R = reward/alpha` given `x_t = x` (n, d), t in (0, 1] a scalar or (n,).

    By a rule on each posterior component, as `control` chooses it: Gauss-Hermite for smooth rewards, exact for
    quadratic ones, and a lattice for any other, which may jump. They exist whether or not the tilt by R does. Raises
    ValueError for an alpha that is not positive, a time without noise, points of another shape, an order below 1, a
    reward of any other kind in more than two dimensions, and a prior that is no Gaussian mixture.
    """
    parts = []
    for weights, values, _ in _posterior_rules(prior, reward, alpha, schedule, x, t, order):
        mean = (weights * values).sum(-1)[None]
        higher = _joint_cumulants(weights, values, values.unsqueeze(-1), max(1, order - 1)).squeeze(-1)
        parts.append(torch.cat([mean, higher])[:order])
    return torch.cat(parts, dim=1)


def gap_series(
    prior: Law,
    reward: Reward,
    alpha: Alpha,
    schedule: NoiseSchedule,
    x: Tensor,
    t: Time,
    *,
    order: int = 4,
) -> Float[Tensor, "terms n d"]:
    """The gap's terms `grad_x kappa_k(R | x_t = x)/k!`, k = 2 .. order, each of size alpha^-k (MATH.md 3).

    They are joint cumulants, `(a/s^2) kappa(R, .., R, x_0 | x)/k!` with k times R. Their sum tends to `jensen_gap`
    where `convergence_radius` is above 1, and diverges where it is below. At orders far above 4 rounding grows with
    sd(R), for moments cancel. Arguments and errors as `reward_cumulants`, with an order of at least 2.
    """
    if order < 2:
        raise ValueError(f"the gap's series starts at order 2, received order {order}")
    rules = _posterior_rules(prior, reward, alpha, schedule, x, t, order)
    gradients = torch.cat([_joint_cumulants(*rule, order) for rule in rules], dim=1)[1:]
    return torch.stack([gradient / float(math.factorial(k)) for k, gradient in enumerate(gradients, start=2)])


def convergence_radius(
    prior: Law, reward: Reward, alpha: Alpha, schedule: NoiseSchedule, x: Tensor, t: Time
) -> Float[Tensor, " n"]:
    """Distance from z = 0 of the nearest complex singularity of `log E[e^(zR) | x_t = x]`.

    To a relative 5e-4 at worst, by the argument principle; to rounding where Newton's method then reaches the zero,
    as it did in every case tried. Zeros are sought up to min(12/sd(R|x), 5000/max_k |E_k[R] - E[R]|) for linear R,
    and less far for a curved one, whose phases turn ever faster towards the branch point 1/|curvature|. Where none
    is found the branch point is returned if it lies within 12/sd(R|x): an upper bound, for a zero may lie between
    the search's end and it, a few percent nearer; else inf, which says that there is none within the search. Raises
    ValueError as `reward_cumulants`, and for a reward that is not quadratic.
    """
    posterior = _require_mixture(prior).posterior(schedule, x, t)
    scaled = require_quadratic(reward, prior.dim).to(posterior.means) * (1 / require_alpha(alpha))
    law = QuadraticCumulants.of(posterior, scaled)
    rows = max(1, ENTRIES // law.slopes[0].numel())
    return torch.cat([_nearest_singularity(piece) for piece in law.split(rows)])


def _posterior_rules(
    prior: Law, reward: Reward, alpha: Alpha, schedule: NoiseSchedule, x: Tensor, t: Time, order: int
) -> Iterator[tuple[Float[Tensor, "n m"], Float[Tensor, "n m"], Float[Tensor, "n m d"]]]:
    """Weights, R and `y = (a/s^2) x_0` up to a constant, at the nodes, for a few points after another."""
    if order < 1:
        raise ValueError(f"the order of a cumulant is at least 1, received {order}")
    mixture, route = _require_mixture(prior), chosen_route(prior, reward)
    # for a quadratic reward R^order y has degree 2 order + 1, which order + 1 nodes integrate exactly
    nodes = order + 1 if route == "closed" else default_order(route, reward, mixture.dim)
    rule: Literal["quadrature", "grid"] = "grid" if route == "grid" else "quadrature"
    for law in Conditional.in_chunks(mixture, reward, alpha, schedule, x, t, rule, nodes):
        log_weights, values, y = law.reward_rule()
        yield log_weights.exp(), values, y


def _require_mixture(prior: Law) -> GaussianMixture:
    if not isinstance(prior, GaussianMixture):
        raise ValueError(f"cumulants need a GaussianMixture as prior, got {type(prior).__name__}; use a dense mixture")
    return prior


def _joint_cumulants(weights: Tensor, values: Tensor, offsets: Tensor, order: int) -> Float[Tensor, "order n d"]:
    """`kappa(R, .., R, y)` with k times R = values (n, m), y = offsets (n, m, d), k = 1 .. order.

    They are the derivatives at z = 0 of the tilted mean `E[e^(zR) y]/E[e^(zR)]`, y centred: dividing the power
    series, `E[R^k y] = sum_j binom(k, j) kappa_j E[R^(k-j)]`.
    """
    centred = values - (weights * values).sum(-1, keepdim=True)
    y = offsets - (weights.unsqueeze(-1) * offsets).sum(-2, keepdim=True)
    powers = [weights * centred**k for k in range(order + 1)]
    moments = [power.sum(-1, keepdim=True) for power in powers]
    cumulants: list[Tensor] = []
    for k, power in enumerate(powers[1:], start=1):
        joint = (power.unsqueeze(-1) * y).sum(-2)
        for j, lower in enumerate(cumulants, start=1):
            joint = joint - math.comb(k, j) * lower * moments[k - j]
        cumulants.append(joint)
    return torch.stack(cumulants)


def _nearest_singularity(law: QuadraticCumulants) -> Float[Tensor, " n"]:
    """From small discs outward, for the farther the circle the more angles its phase needs."""
    search, branch = SEARCH / law.variance().sqrt().clamp_min(1e-6), law.branch_point()
    end = torch.minimum(search, NEAR * branch)
    end, _ = _bisect(lambda radius: law.phase_rate(radius) > TURNS, torch.zeros_like(end), end, 20)
    # On the first circle every phase is at most TURNS/2^DOUBLINGS < pi/2, so no terms cancel.
    low, high = torch.zeros_like(end), end * 2.0**-DOUBLINGS
    for _ in range(DOUBLINGS):
        free = ~_encloses_zero(law, high)
        low, high = torch.where(free, high, low), torch.where(free, 2 * high, high)
    found = _encloses_zero(law, high)
    nearest = torch.where(branch <= search, branch, torch.inf)
    return nearest.masked_scatter(found, _nearest_zero(law[found], low[found], high[found]))


def _nearest_zero(law: QuadraticCumulants, low: Tensor, high: Tensor) -> Float[Tensor, " n"]:
    """Modulus of the zero that the disc of radius `high` holds and that of `low`, its half, does not."""
    low, high = _bisect(lambda radius: _encloses_zero(law, radius), low, high, BISECTIONS)
    circle = _arc(law, high)
    terms = law.terms(circle)
    # several starts, for far along a narrow wedge zeros lie at nearly one modulus
    starts = (terms.sum(1).abs() / terms.abs().sum(1)).topk(STARTS, largest=False).indices
    z = circle.gather(-1, starts)
    for _ in range(NEWTON_STEPS):
        terms = law.terms(z)
        z = z - terms.sum(1) / (terms * law.rates(z)).sum(1)
    near = (z.abs() / high.unsqueeze(-1) - 1).abs() < 2 * 2.0**-BISECTIONS
    return torch.where(near.any(-1), z.abs().masked_fill(~near, torch.inf).amin(-1), high)


def _encloses_zero(law: QuadraticCumulants, radius: Tensor) -> Bool[Tensor, " n"]:
    """Argument principle: zeros come in conjugate pairs, each of which turns the upper half circle by 2 pi."""
    values = law.generating_function(_arc(law, radius))
    return (values[:, 1:] * values[:, :-1].conj()).angle().sum(-1) > torch.pi


def _arc(law: QuadraticCumulants, radius: Tensor) -> Complex[Tensor, "n arc"]:
    # Half a turn at one radian a step. Chords of F, not quite those of the circle, shift it by less than 2e-4.
    rate = max(law.phase_rate(radius).tolist(), default=0.0)
    return law.arc(radius, 512 + math.ceil(math.pi * rate))


def _bisect(beyond: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    for _ in range(steps):
        middle = 0.5 * (low + high)
        over = beyond(middle)
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return low, high
