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
from jaxtyping import Complex, Float
from torch import Tensor

from dbtheory.conditional import noise_ratio
from dbtheory.mixture import GaussianMixture, apply_each
from dbtheory.quadrature import gauss_hermite
from dbtheory.reward import QuadraticReward, Reward
from dbtheory.schedule import NoiseSchedule, Time, as_time
from dbtheory.tilt import Scale, require_alpha, require_quadratic

NODES = 24  # Gauss-Hermite nodes a coordinate where the reward is not quadratic
SEARCH = 12.0  # how far singularities are looked for, in units of 1/sd(R)
ARC = 256  # angles on a half circle that resolve the phase of E[e^(zR)] there


def reward_cumulants(
    prior: GaussianMixture,
    reward: Reward,
    alpha: Scale,
    schedule: NoiseSchedule,
    x: Tensor,
    t: Time,
    *,
    order: int = 4,
    nodes: int | None = None,
) -> Float[Tensor, "order n"]:
    """`kappa_1 .. kappa_order` of `R = reward/alpha` given `x_t = x` (n, d), t in (0, 1] a scalar or (n,).

    By Gauss-Hermite on each posterior component with `nodes` points a coordinate; by default as many as make a
    quadratic reward exact, 24 for any other. Raises ValueError as `control`, and for an order below 1.
    """
    weights, values, _ = _posterior_rule(prior, reward, alpha, schedule, x, t, order, nodes)
    mean = (weights * values).sum(-1)
    if order == 1:
        return mean[None]
    return torch.cat([mean[None], _joint_cumulants(weights, values, values.unsqueeze(-1), order - 1).squeeze(-1)])


def gap_series(
    prior: GaussianMixture,
    reward: Reward,
    alpha: Scale,
    schedule: NoiseSchedule,
    x: Tensor,
    t: Time,
    *,
    order: int = 4,
    nodes: int | None = None,
) -> Float[Tensor, "terms n d"]:
    """The gap's terms `grad_x kappa_k(R | x_t = x)/k!`, k = 2 .. order, each of size alpha^-k (MATH.md 3).

    They are joint cumulants, `(a/s^2) kappa(R, .., R, x_0 | x)/k!` with k times R. Their sum tends to `jensen_gap`
    where `convergence_radius` is above 1, and diverges where it is below. At orders far above 4 rounding grows with
    sd(R), for moments cancel. Arguments and errors as `reward_cumulants`, with an order of at least 2.
    """
    if order < 2:
        raise ValueError(f"the gap's series starts at order 2, received order {order}")
    weights, values, offsets = _posterior_rule(prior, reward, alpha, schedule, x, t, order, nodes)
    gradients = _joint_cumulants(weights, values, offsets, order)[1:]
    return torch.stack([gradient / float(factorial(k)) for k, gradient in enumerate(gradients, start=2)])


def convergence_radius(
    prior: GaussianMixture, reward: Reward, alpha: Scale, schedule: NoiseSchedule, x: Tensor, t: Time
) -> Float[Tensor, " n"]:
    """Distance from z = 0 of the nearest complex singularity of `log E[e^(zR) | x_t = x]`, to a relative 1e-4.

    inf where there is none within 12/sd(R|x). Raises ValueError as `control`, and for a reward that is not
    quadratic.
    """
    scaled = require_quadratic(reward, prior.dim).to(prior.means) * (1 / require_alpha(alpha))
    posterior = prior.posterior(schedule, x, t)
    # by few points, for the tables are large: (points, components, angles, d)
    pieces = zip(*(part.split(64) for part in _component_laws(posterior, scaled)), strict=True)
    return torch.cat([_nearest_singularity(*piece) for piece in pieces])


def _posterior_rule(
    prior: GaussianMixture,
    reward: Reward,
    alpha: Scale,
    schedule: NoiseSchedule,
    x: Tensor,
    t: Time,
    order: int,
    nodes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """At the nodes: weights (n, m), R (n, m), and `y = (a/s^2) x_0` (n, m, d) up to a constant."""
    if order < 1:
        raise ValueError(f"the order of a cumulant is at least 1, received {order}")
    if nodes is None:
        # R^order y has degree 2 order + 1, which order + 1 nodes integrate exactly
        nodes = order + 1 if isinstance(reward, QuadraticReward) else NODES
    posterior = prior.posterior(schedule, x, t)
    points, log_weights = gauss_hermite(nodes, prior.dim, prior.means)
    offsets = points @ posterior.root.mT
    values = reward.to(points)(posterior.means.unsqueeze(-2) + offsets) / require_alpha(alpha)
    # y by Tweedie's formula: its mean in a component is that component's score, but for a common constant
    ratio = noise_ratio(schedule, as_time(t)).to(points)
    scores = prior.noised(schedule, t).component_scores(x)
    y = scores.unsqueeze(-2) + (ratio.reshape(-1, 1, 1, 1) if ratio.ndim else ratio) * offsets
    weights = (posterior.log_weights.unsqueeze(-1) + log_weights).exp()
    return weights.flatten(1), values.flatten(1), y.flatten(1, 2)


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


def _component_laws(posterior: GaussianMixture, scaled: QuadraticReward) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """R in each component is `value + slopes'z - 1/2 z' diag(curvatures) z`, z ~ N(0, I), up to a common constant:
    log weights and values (n, K), slopes and curvatures (n, K, d)."""
    root = posterior.root
    curvatures, axes = torch.linalg.eigh(root.mT @ scaled.Q @ root)
    slopes = apply_each(axes.mT, apply_each(root.mT, scaled.gradient(posterior.means)))
    values = scaled(posterior.means)
    mean = (posterior.weights * (values - 0.5 * curvatures.sum(-1))).sum(-1, keepdim=True)
    return posterior.log_weights, values - mean, slopes, curvatures.expand_as(slopes)


def _nearest_singularity(log_weights: Tensor, values: Tensor, slopes: Tensor, curvatures: Tensor) -> Tensor:
    """By bisection: the disc below the nearest branch point, where `E[e^(zR)]` is analytic, holds a zero or none."""
    within = (slopes.square() + 0.5 * curvatures.square()).sum(-1) + (values - 0.5 * curvatures.sum(-1)).square()
    deviation = (log_weights.exp() * within).sum(-1).sqrt()
    limit = SEARCH / deviation.clamp_min(1e-6)
    low, high = torch.zeros_like(limit), torch.minimum(limit, 1 / curvatures.abs().flatten(1).amax(-1))
    angles = torch.linspace(0, torch.pi, ARC + 1).to(limit)
    for _ in range(20):
        radius = 0.5 * (low + high)
        values_on_arc = _generating_function(
            radius.unsqueeze(-1) * torch.exp(1j * angles), log_weights, values, slopes, curvatures
        )
        # Argument principle: zeros come in conjugate pairs, each of which turns the upper half circle by 2 pi.
        turn = (values_on_arc[:, 1:] * values_on_arc[:, :-1].conj()).angle().sum(-1)
        low, high = torch.where(turn > 1, low, radius), torch.where(turn > 1, radius, high)
    return high.masked_fill(high == limit, torch.inf)


def _generating_function(
    z: Complex[Tensor, "n arc"], log_weights: Tensor, values: Tensor, slopes: Tensor, curvatures: Tensor
) -> Complex[Tensor, "n arc"]:
    """`E[e^(zR)]` up to a positive factor, in closed form for each component."""
    z = z[:, None, :, None]
    stretch = 1 + z * curvatures.unsqueeze(-2)
    within = (0.5 * z**2 * slopes.unsqueeze(-2).square() / stretch - 0.5 * stretch.log()).sum(-1)
    logs = log_weights.unsqueeze(-1) + z.squeeze(-1) * values.unsqueeze(-1) + within
    return (logs - logs.real.amax(1, keepdim=True)).exp().sum(1)
