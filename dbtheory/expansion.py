"""The cumulant series of the Jensen gap, and where it converges (MATH.md 3).

`K(z, x) = log E[e^(zR) | x_t = x]`, with `R = reward/alpha` under the prior's posterior, generates R's cumulants:
`K = sum_k kappa_k z^k/k!`. Its gradient in x at z = 1 is the control, whose first term `grad kappa_1` is the Jensen
control; the rest is the gap. In z this is a power series, which converges at z = 1 where the nearest complex
singularity of K, a zero of `E[e^(zR) | x]` or a branch point, lies farther than 1. Since R is the reward over alpha,
halving alpha halves that distance: at every x without Gaussian R there is an alpha below which the series diverges.
"""

from __future__ import annotations

from math import comb, factorial

import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.conditional import Conditional
from dbtheory.law import Law
from dbtheory.mixture import GaussianMixture
from dbtheory.quadratic_cumulants import QuadraticCumulants
from dbtheory.reward import QuadraticReward, Reward
from dbtheory.schedule import NoiseSchedule, Time
from dbtheory.tilt import Alpha, require_alpha, require_quadratic

NODES = 24  # Gauss-Hermite nodes a coordinate where the reward is not quadratic
SEARCH = 12.0  # how far singularities are looked for, in units of 1/sd(R)
ARC = 256  # angles on a half circle that resolve the phase of E[e^(zR)] there


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

    By Gauss-Hermite on each posterior component, with as many nodes a coordinate as make a quadratic reward exact and
    24 for any other. They exist whether or not the tilt by R does. Raises ValueError for an alpha that is not
    positive, a time without noise, points of another shape, an order below 1, and a prior that is no Gaussian mixture.
    """
    weights, values, _ = _posterior_rule(prior, reward, alpha, schedule, x, t, order)
    mean = (weights * values).sum(-1)
    if order == 1:
        return mean[None]
    return torch.cat([mean[None], _joint_cumulants(weights, values, values.unsqueeze(-1), order - 1).squeeze(-1)])


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
    weights, values, offsets = _posterior_rule(prior, reward, alpha, schedule, x, t, order)
    gradients = _joint_cumulants(weights, values, offsets, order)[1:]
    return torch.stack([gradient / float(factorial(k)) for k, gradient in enumerate(gradients, start=2)])


def convergence_radius(
    prior: Law, reward: Reward, alpha: Alpha, schedule: NoiseSchedule, x: Tensor, t: Time
) -> Float[Tensor, " n"]:
    """Distance from z = 0 of the nearest complex singularity of `log E[e^(zR) | x_t = x]`, to a relative 1e-4.

    inf where there is none within 12/sd(R|x). Raises ValueError as `reward_cumulants`, and for a reward that is not
    quadratic.
    """
    posterior = _require_mixture(prior).posterior(schedule, x, t)
    scaled = require_quadratic(reward, prior.dim).to(posterior.means) * (1 / require_alpha(alpha))
    law = QuadraticCumulants.of(posterior, scaled)
    # by few points, for the tables are large: (points, components, angles, d)
    return torch.cat([_nearest_singularity(piece) for piece in law.split(64)])


def _posterior_rule(
    prior: Law, reward: Reward, alpha: Alpha, schedule: NoiseSchedule, x: Tensor, t: Time, order: int
) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"], Float[Tensor, "n m d"]]:
    """Weights, R and `y = (a/s^2) x_0` up to a constant, at the nodes. Cumulants exist where a tilt does not."""
    if order < 1:
        raise ValueError(f"the order of a cumulant is at least 1, received {order}")
    # R^order y has degree 2 order + 1, which order + 1 nodes integrate exactly
    nodes = order + 1 if isinstance(reward, QuadraticReward) else NODES
    mixture = _require_mixture(prior)
    law = Conditional.at(mixture, reward, alpha, schedule, x, t, "quadrature", nodes)
    log_weights, values, y = law.reward_rule()
    return log_weights.exp(), values, y


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
            joint = joint - comb(k, j) * lower * moments[k - j]
        cumulants.append(joint)
    return torch.stack(cumulants)


def _nearest_singularity(law: QuadraticCumulants) -> Float[Tensor, " n"]:
    """By bisection: the disc below the nearest branch point, where `E[e^(zR)]` is analytic, holds a zero or none."""
    limit = SEARCH / law.variance().sqrt().clamp_min(1e-6)
    low, high = torch.zeros_like(limit), torch.minimum(limit, 1 / law.curvatures.abs().flatten(1).amax(-1))
    angles = torch.linspace(0, torch.pi, ARC + 1).to(limit)
    for _ in range(20):
        radius = 0.5 * (low + high)
        values_on_arc = law.generating_function(radius.unsqueeze(-1) * torch.exp(1j * angles))
        # Argument principle: zeros come in conjugate pairs, each of which turns the upper half circle by 2 pi.
        turn = (values_on_arc[:, 1:] * values_on_arc[:, :-1].conj()).angle().sum(-1)
        low, high = torch.where(turn > 1, low, radius), torch.where(turn > 1, radius, high)
    return high.masked_fill(high == limit, torch.inf)
