"""What a reward adds to the score: the control, its Jensen approximation, the gap (MATH.md 3).

Paper Proposition 1. With `R = reward/alpha`, expectations under the prior's posterior of `x_0` given
`x_t = x`, and `F = E[e^R]`:

    control         u    = grad_x log E[e^R]  = (alpha_t/sigma_t^2) Cov(e^R/F, x_0)
    jensen_control  ubar = grad_x E[R]        = (alpha_t/sigma_t^2) Cov(R, x_0)
    jensen_gap      gap  = u - ubar           = (alpha_t/sigma_t^2) Cov(e^R/F - R, x_0)

Four routes give each of them:

- "closed": u is the target's score minus the prior's; ubar and gap are the covariances, from the moments of
  the posterior and of the tilted posterior. Quadratic rewards only.
- "quadrature": the covariances by Gauss-Hermite on each posterior component (`dbtheory.conditional`).
- "grid": the covariances by a lattice on each posterior component, in one and two dimensions; where the prior is
  a `GridLaw`, ratios of noised densities on its nodes (`dbtheory.grid_conditional`).
- "autograd": the gradients in x of log E[e^R] and E[R], closed where the reward is quadratic, else by
  Gauss-Hermite.

Left open, the route follows from what the reward is: closed for a `QuadraticReward`, quadrature for a
`SmoothReward`, grid for any other and for any prior on a grid. `dbtheory.estimate` says which, with its error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.conditional import Conditional, dimensions, noise_ratio
from dbtheory.grid import GridLaw
from dbtheory.grid_conditional import GridConditional
from dbtheory.law import Law
from dbtheory.mixture import GaussianMixture
from dbtheory.reward import QuadraticReward, Reward, SmoothReward
from dbtheory.schedule import NoiseSchedule, Time
from dbtheory.tilt import Alpha, require_quadratic, tilt, whitened_tilt

Route = Literal["closed", "quadrature", "grid", "autograd"]
_GAUSS_HERMITE_ORDER = 24
_LATTICE_ORDER = {1: 2048, 2: 128}


def control(
    prior: Law,
    reward: Reward,
    alpha: Alpha,
    schedule: NoiseSchedule,
    x: Tensor,
    t: Time,
    *,
    route: str | None = None,
    order: int | None = None,
) -> Float[Tensor, "n d"]:
    """`u = score_target - score_prior` at the points `x` (n, d) and time `t` in (0, 1], a scalar or (n,).

    `alpha > 0` is the strength of the KL term; `order` counts the nodes of a rule along each dimension (default: 24
    for Gauss-Hermite; a lattice has 2048 on a line, 128 on a plane). Paper Proposition 1. Raises ValueError as
    `tilt`, for `t = 0`, for points of another shape, for an unknown route, and for a reward or a prior to which
    the route does not apply.
    """
    if isinstance(prior, GridLaw):
        return _on_grid(prior, reward, alpha, schedule, x, t, route).control()
    laws, route = conditionals(prior, reward, alpha, schedule, t, route, order)
    if route == "closed":
        target = tilt(prior, require_quadratic(reward, prior.dim), alpha)
        return target.noised(schedule, t).score(x) - prior.noised(schedule, t).score(x)
    if route == "autograd":
        return _gradient(Conditional.log_expectation, laws, x, prior)
    return over_chunks(Conditional.tilted_mean_by_quadrature, laws(x))


def jensen_control(
    prior: Law,
    reward: Reward,
    alpha: Alpha,
    schedule: NoiseSchedule,
    x: Tensor,
    t: Time,
    *,
    route: str | None = None,
    order: int | None = None,
) -> Float[Tensor, "n d"]:
    """`ubar = grad_x E[R | x_t = x]`, (n, d), linear in the reward; arguments and errors as `control`."""
    if isinstance(prior, GridLaw):
        return _on_grid(prior, reward, alpha, schedule, x, t, route).jensen_control()
    laws, route = conditionals(prior, reward, alpha, schedule, t, route, order)
    if route == "autograd":
        return _gradient(Conditional.expectation, laws, x, prior)
    if route == "closed":
        return over_chunks(Conditional.reward_covariance, laws(x))
    return over_chunks(Conditional.reward_covariance_by_quadrature, laws(x))


def jensen_gap(
    prior: Law,
    reward: Reward,
    alpha: Alpha,
    schedule: NoiseSchedule,
    x: Tensor,
    t: Time,
    *,
    route: str | None = None,
    order: int | None = None,
) -> Float[Tensor, "n d"]:
    """`Cov(e^R/F - R, x_0)` scaled, (n, d): equals `control - jensen_control`; arguments and errors as `control`.

    The closed route never forms the target: it tilts the posterior, where `control` noises the tilted prior.
    That the two agree is Proposition 1.
    """
    if isinstance(prior, GridLaw):
        law = _on_grid(prior, reward, alpha, schedule, x, t, route)
        return law.control() - law.jensen_control()
    laws, route = conditionals(prior, reward, alpha, schedule, t, route, order)
    if route == "autograd":
        return _gradient(Conditional.log_jensen_ratio, laws, x, prior)
    if route == "closed":
        return over_chunks(lambda law: law.tilted_mean() - law.reward_covariance(), laws(x))
    return over_chunks(lambda law: law.tilted_mean_by_quadrature() - law.reward_covariance_by_quadrature(), laws(x))


def log_expectation(
    prior: Law, reward: Reward, alpha: Alpha, schedule: NoiseSchedule, x: Tensor, t: Time
) -> Float[Tensor, " n"]:
    """`log E[e^R | x_t = x]`, whose gradient is the control, by the route that is chosen; errors as `control`."""
    if isinstance(prior, GridLaw):
        return _on_grid(prior, reward, alpha, schedule, x, t, None).log_expectation()
    laws, _ = conditionals(prior, reward, alpha, schedule, t, None, None)
    return over_chunks(Conditional.log_expectation, laws(x))


def chosen_route(prior: Law, reward: Reward) -> Route:
    """The route that the reward and the prior ask for."""
    if isinstance(prior, GridLaw):
        return "grid"
    if isinstance(reward, QuadraticReward):
        return "closed"
    return "quadrature" if isinstance(reward, SmoothReward) else "grid"


def default_order(route: str, reward: Reward, dim: int) -> int:
    """Nodes along each dimension; ValueError where a lattice would have more than two dimensions."""
    if route != "grid":
        return _GAUSS_HERMITE_ORDER
    k = dimensions(reward, dim)
    if k not in _LATTICE_ORDER:
        raise ValueError(
            f"a {type(reward).__name__} needs a grid, which has at most two dimensions, got {k}; if it is smooth use "
            "SmoothReward, with the `directions` on which it depends if there are more than three dimensions"
        )
    return _LATTICE_ORDER[k]


def conditionals(
    prior: Law,
    reward: Reward,
    alpha: Alpha,
    schedule: NoiseSchedule,
    t: Time,
    route: str | None,
    order: int | None,
) -> tuple[Callable[[Tensor], Iterator[Conditional]], Route]:
    """Checks what does not depend on x; the conditional laws at given points remain, and the route."""
    chosen = _known(route) or chosen_route(prior, reward)
    noise_ratio(schedule, t)
    if not isinstance(prior, GaussianMixture):
        raise ValueError(f"the control needs a GaussianMixture or a GridLaw as prior, got {type(prior).__name__}")
    if isinstance(reward, QuadraticReward):
        whitened_tilt(prior, reward, alpha)  # raises where the target does not exist
    if chosen == "closed":
        require_quadratic(reward, prior.dim)
    if chosen == "closed" or (chosen == "autograd" and isinstance(reward, QuadraticReward)):
        order = 1  # closed forms use no rule, whose nodes would only make the chunks small
    nodes = default_order(chosen, reward, prior.dim) if order is None else order
    rule: Literal["quadrature", "grid"] = "grid" if chosen == "grid" else "quadrature"

    def laws(x: Tensor) -> Iterator[Conditional]:
        return Conditional.in_chunks(prior, reward, alpha, schedule, x, t, rule, nodes)

    return laws, chosen


def over_chunks(quantity: Callable[[Conditional], Tensor], laws: Iterator[Conditional]) -> Tensor:
    """One quantity of every chunk of points, put together."""
    return torch.cat([quantity(law) for law in laws])


def _known(route: str | None) -> Route | None:
    for known in get_args(Route):
        if route == known:
            return known
    if route is not None:
        raise ValueError(f"unknown route {route!r}; use one of {', '.join(get_args(Route))}, or None")
    return None


def _on_grid(
    prior: GridLaw, reward: Reward, alpha: Alpha, schedule: NoiseSchedule, x: Tensor, t: Time, route: str | None
) -> GridConditional:
    noise_ratio(schedule, t)
    if _known(route) not in (None, "grid"):
        raise ValueError(f'a prior on a grid has the route "grid" alone, got {route!r}; leave it out')
    return GridConditional.at(prior, reward, alpha, schedule, x, t)


def _gradient(
    quantity: Callable[[Conditional], Tensor],
    laws: Callable[[Tensor], Iterator[Conditional]],
    x: Tensor,
    prior: Law,
) -> Tensor:
    with torch.enable_grad():
        points = x.detach().to(prior.mean).requires_grad_(True)
        (gradient,) = torch.autograd.grad(over_chunks(quantity, laws(points)).sum(), points)
    return gradient
