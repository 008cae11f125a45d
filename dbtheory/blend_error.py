"""What an affine blend of exact experts gets wrong: the gradient of one potential, and its path KL (MATH.md 4).

With coefficients c over {"base", rewards} that sum to 1, a blend adds `sum_i c_i u_i` to the prior's score, where
the exact score adds the control of `r(c) = sum_i c_i r_i` (the base's reward and control are 0). The difference is
`grad G`, `G = sum_i c_i log E[e^(r_i/alpha) | x_t] - log E[e^(r(c)/alpha) | x_t]` (paper Lemma 1). DB-MPA, DB-KLA, both
at once and `InterpolatedBlend` are such blends.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import reduce

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.control import jensen_gap, log_expectation
from dbtheory.expansion import gap_series
from dbtheory.law import Law
from dbtheory.mixture import GaussianMixture
from dbtheory.preference import BASE, SUM_TOLERANCE
from dbtheory.reward import Reward
from dbtheory.schedule import NoiseSchedule, Time
from dbtheory.tilt import Alpha, require_quadratic, tilt

Coefficients = Mapping[str, float]


def combined_reward(rewards: Mapping[str, Reward], coefficients: Coefficients) -> Reward:
    """`r(c) = sum_i c_i r_i`; ValueError unless c is over the base and these rewards, and sums to 1."""
    total = sum(coefficients.values())
    if not rewards or not set(coefficients) <= {BASE, *rewards} or not abs(total - 1) <= SUM_TOLERANCE:
        raise ValueError(
            f'coefficients must be over "{BASE}" and {list(rewards)} and sum to 1, received {dict(coefficients)}'
        )
    return reduce(operator.add, (coefficients.get(name, 0.0) * reward for name, reward in rewards.items()))


def blend_potential(
    prior: Law,
    rewards: Mapping[str, Reward],
    coefficients: Coefficients,
    alpha: Alpha,
    schedule: NoiseSchedule,
    x: Tensor,
    t: Time,
) -> Float[Tensor, " n"]:
    """`G` at the points `x` (n, d), t in (0, 1] a scalar or (n,).

    By Hoelder's inequality G >= 0 where no coefficient is negative, and G <= 0 where only one is positive: a KL
    scale above 1 with one reward. Raises ValueError as `control`, for names that are not there, and for
    coefficients that do not sum to 1.
    """
    return _excess(lambda reward: log_expectation(prior, reward, alpha, schedule, x, t), rewards, coefficients)


def blend_error(
    prior: Law,
    rewards: Mapping[str, Reward],
    coefficients: Coefficients,
    alpha: Alpha,
    schedule: NoiseSchedule,
    x: Tensor,
    t: Time,
) -> Float[Tensor, "n d"]:
    """`grad G = score_blend - score_exact` as Lemma 1 has it, `sum_i c_i gap_i - gap_c` (paper eq. 9 and 10).

    Arguments and errors as `blend_potential`.
    """
    return _excess(lambda reward: jensen_gap(prior, reward, alpha, schedule, x, t), rewards, coefficients)


def blend_error_series(
    prior: Law,
    rewards: Mapping[str, Reward],
    coefficients: Coefficients,
    alpha: Alpha,
    schedule: NoiseSchedule,
    x: Tensor,
    t: Time,
    *,
    order: int = 4,
) -> Float[Tensor, "terms n d"]:
    """Terms of `grad G` of size alpha^-k, k = 2 .. order: `sum_i c_i grad kappa_k(R_i)/k! - grad kappa_k(R_c)/k!`.

    The first is `1/2 grad sum_{i<j} c_i c_j Var(R_i - R_j | x)` over the base (R = 0) and the rewards; for one
    reward `1/2 lambda (1 - lambda) grad Var(R | x)`. It vanishes under quadratic interpolation, for variances are
    quadratic in c. Arguments and errors as `blend_potential` and `gap_series`.
    """
    return _excess(lambda reward: gap_series(prior, reward, alpha, schedule, x, t, order=order), rewards, coefficients)


def path_kl(
    prior: Law,
    rewards: Mapping[str, Reward],
    coefficients: Coefficients,
    alpha: Alpha,
    schedule: NoiseSchedule,
    n: int,
    generator: torch.Generator,
    *,
    times: int = 32,
) -> tuple[float, float]:
    """`1/2 int g^2 E_exact |grad G|^2 dt` in nats, with its standard error (MATH.md 4; Girsanov).

    The KL divergence of the exact reverse-time process from the blend's, both from t_start to t_end and with one law
    at t_start. The expectation is under the exact process, whose marginals are those of the noised target
    `prior e^(r(c)/alpha)/Z`: `n` draws of it at each of `times` Gauss-Legendre nodes. With the KL of the laws at
    t_start added, it bounds the KL of the exact marginal from the blend's at every time. Raises ValueError as
    `blend_potential`, as `tilt` where the target does not exist in closed form, and for fewer than two draws, which
    have no standard error.
    """
    if n < 2:
        raise ValueError(f"the standard error needs at least two draws, received n = {n}")
    target = tilt(prior, combined_reward(rewards, coefficients), alpha)
    moments = []
    for t, weight in _time_rule(schedule, times):
        x0 = target.sample(n, generator)
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
        x = schedule.alpha(t) * x0 + schedule.sigma(t) * noise
        error = blend_error(prior, rewards, coefficients, alpha, schedule, x, t)
        rate = 0.5 * weight * schedule.diffusion_squared(t) * error.square().sum(-1)
        moments.append((float(rate.mean()), float(rate.var()) / n))
    mean, variance = np.sum(moments, axis=0)
    return float(mean), float(variance) ** 0.5


def path_kl_on_line(
    prior: GaussianMixture,
    rewards: Mapping[str, Reward],
    coefficients: Coefficients,
    alpha: Alpha,
    schedule: NoiseSchedule,
    *,
    times: int = 32,
    spacing: float = 0.05,
) -> float:
    """`path_kl` in one dimension without chance: the trapezoidal rule in x, Gauss-Legendre in t.

    `spacing` is in units of the noised target's narrowest component. Errors as `path_kl`, and ValueError in more
    than one dimension.
    """
    if prior.dim != 1:
        raise ValueError(f"path_kl_on_line is for one dimension, received {prior.dim}; use path_kl")
    target, total = tilt(prior, require_quadratic(combined_reward(rewards, coefficients), 1), alpha), 0.0
    for t, weight in _time_rule(schedule, times):
        law = target.noised(schedule, t)
        deviation = law.eigenvalues.sqrt()
        low, high = float((law.means - 9 * deviation).min()), float((law.means + 9 * deviation).max())
        x = torch.linspace(low, high, int((high - low) / (spacing * float(deviation.min()))) + 2).to(prior.means)
        error = blend_error(prior, rewards, coefficients, alpha, schedule, x.unsqueeze(-1), t).squeeze(-1)
        mean_square = torch.trapezoid(law.log_prob(x.unsqueeze(-1)).exp() * error.square(), x)
        total += 0.5 * weight * float(schedule.diffusion_squared(t) * mean_square)
    return total


def _time_rule(schedule: NoiseSchedule, times: int) -> list[tuple[float, float]]:
    """Gauss-Legendre nodes in the square root of t, for the integrand bends most near the data, and weights."""
    if times < 1:
        raise ValueError(f"the integral over time needs at least one node, received {times}")
    nodes, weights = np.polynomial.legendre.leggauss(times)
    root, span = 0.5 * (nodes + 1), schedule.t_start - schedule.t_end
    return list(zip((schedule.t_end + span * root**2).tolist(), (span * root * weights).tolist(), strict=True))


def _excess(
    functional: Callable[[Reward], Tensor], rewards: Mapping[str, Reward], coefficients: Coefficients
) -> Tensor:
    """`sum_i c_i functional(r_i) - functional(r(c))`, for a functional that is 0 without a reward."""
    exact = functional(combined_reward(rewards, coefficients))
    return sum((c * functional(rewards[name]) for name, c in coefficients.items() if name != BASE and c != 0), -exact)
