"""What a reward adds to the score: the control, its Jensen approximation, the gap (MATH.md 3).

Paper Proposition 1. With `R = reward/alpha`, expectations under the prior's posterior of `x_0` given
`x_t = x`, and `F = E[e^R]`:

    control         u    = grad_x log E[e^R]  = (alpha_t/sigma_t^2) Cov(e^R/F, x_0)
    jensen_control  ubar = grad_x E[R]        = (alpha_t/sigma_t^2) Cov(R, x_0)
    jensen_gap      gap  = u - ubar           = (alpha_t/sigma_t^2) Cov(e^R/F - R, x_0)

Three routes give each of them:

- "closed": u is the target's score minus the prior's; ubar and gap are the covariances, from the moments of
  the posterior and of the tilted posterior. Quadratic rewards only.
- "quadrature": the covariances by Gauss-Hermite on each posterior component (`dbtheory.conditional`).
- "autograd": the gradients in x of log E[e^R] and E[R], closed where the reward is quadratic, else by
  Gauss-Hermite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.conditional import Conditional, noise_ratio
from dbtheory.mixture import GaussianMixture
from dbtheory.reward import Reward
from dbtheory.schedule import NoiseSchedule, Time
from dbtheory.tilt import Scale, tilt

Route = Literal["closed", "quadrature", "autograd"]


def control(
    prior: GaussianMixture,
    reward: Reward,
    alpha: Scale,
    schedule: NoiseSchedule,
    x: Tensor,
    t: Time,
    *,
    route: str = "closed",
    order: int = 24,
) -> Float[Tensor, "n d"]:
    """`u = score_target - score_prior` at the points `x` (n, d) and time `t` in (0, 1], a scalar or (n,).

    `alpha > 0` is the strength of the KL term; `order` is that of the Gauss-Hermite rules. Paper Proposition
    1. Raises ValueError as `tilt`, for `t = 0`, for points of another shape, for an unknown route, and for a
    reward that is not quadratic under the closed route.
    """
    given = _conditional(prior, reward, alpha, schedule, t, route, order)
    if route == "closed":
        target = tilt(prior, reward, alpha)
        return target.noised(schedule, t).score(x) - prior.noised(schedule, t).score(x)
    if route == "quadrature":
        return given(x).tilted_mean_by_quadrature()
    return _gradient(lambda points: given(points).log_expectation(), x, prior)


def jensen_control(
    prior: GaussianMixture,
    reward: Reward,
    alpha: Scale,
    schedule: NoiseSchedule,
    x: Tensor,
    t: Time,
    *,
    route: str = "closed",
    order: int = 24,
) -> Float[Tensor, "n d"]:
    """`ubar = grad_x E[R | x_t = x]`, (n, d), linear in the reward; arguments and errors as `control`."""
    given = _conditional(prior, reward, alpha, schedule, t, route, order)
    if route == "closed":
        return given(x).reward_covariance()
    if route == "quadrature":
        return given(x).reward_covariance_by_quadrature()
    return _gradient(lambda points: given(points).expectation(), x, prior)


def jensen_gap(
    prior: GaussianMixture,
    reward: Reward,
    alpha: Scale,
    schedule: NoiseSchedule,
    x: Tensor,
    t: Time,
    *,
    route: str = "closed",
    order: int = 24,
) -> Float[Tensor, "n d"]:
    """`Cov(e^R/F - R, x_0)` scaled, (n, d): equals `control - jensen_control`; arguments and errors as
    `control`.

    The closed route never forms the target: it tilts the posterior, where `control` noises the tilted prior.
    That the two agree is Proposition 1.
    """
    given = _conditional(prior, reward, alpha, schedule, t, route, order)
    if route == "closed":
        law = given(x)
        return law.tilted_mean() - law.reward_covariance()
    if route == "quadrature":
        law = given(x)
        return law.tilted_mean_by_quadrature() - law.reward_covariance_by_quadrature()
    return _gradient(lambda points: given(points).log_jensen_ratio(), x, prior)


def _conditional(
    prior: GaussianMixture,
    reward: Reward,
    alpha: Scale,
    schedule: NoiseSchedule,
    t: Time,
    route: str,
    order: int,
) -> Callable[[Tensor], Conditional]:
    """Checks what does not depend on x; the conditional law at given points remains."""
    if route not in get_args(Route):
        raise ValueError(f"unknown route {route!r}; use one of {', '.join(get_args(Route))}")
    noise_ratio(schedule, t)
    return lambda x: Conditional.at(prior, reward, alpha, schedule, x, t, order)


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor, prior: GaussianMixture) -> Tensor:
    with torch.enable_grad():
        points = x.detach().to(prior.means).requires_grad_(True)
        (gradient,) = torch.autograd.grad(function(points).sum(), points)
    return gradient
