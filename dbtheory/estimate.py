"""Everything that a reward does at a point, with the method that the reward asked for and the method's error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.conditional import Conditional
from dbtheory.control import chosen_route, conditionals, control, default_order
from dbtheory.grid import GridLaw
from dbtheory.grid_conditional import GridConditional
from dbtheory.law import Law
from dbtheory.reward import Reward
from dbtheory.schedule import NoiseSchedule, Time
from dbtheory.tilt import Alpha


@dataclass(frozen=True)
class Estimate:
    """With `R = reward/alpha`, under the prior's posterior of `x_0` given `x_t = x`, for n points (MATH.md 3)."""

    control: Float[Tensor, "n d"]  # grad log E[e^R]
    jensen_control: Float[Tensor, "n d"]  # grad E[R]
    jensen_gap: Float[Tensor, "n d"]  # their difference
    log_expectation: Float[Tensor, " n"]  # log E[e^R]
    expectation: Float[Tensor, " n"]  # E[R]
    method: str
    """"closed", "quadrature" (Gauss-Hermite on the posterior's components) or "grid"; a route of `control`."""
    order: int | None
    """Nodes along each dimension; None for a closed form."""
    error: float
    """An estimate of the largest absolute error over points, coordinates and the five quantities, each in its own unit:
    how far the values move when the nodes along each dimension are doubled. A reward that jumps may err a few times
    more. For a closed form, how far the target's score minus the prior's is from the sum of the two covariances."""


_Values = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def estimate(
    prior: Law,
    reward: Reward,
    alpha: Alpha,
    schedule: NoiseSchedule,
    x: Tensor,
    t: Time,
    *,
    order: int | None = None,
) -> Estimate:
    """Control, Jensen control, gap and both expectations at the points `x` (n, d), time `t` in (0, 1] or (n,).

    The method is that of `control` with its route left open, and it is stated in the result. The values are those of
    the finer rule, `order`; the error compares them with half as many nodes. The default order is twice that of
    `control`; a prior on a grid has its own nodes and takes no order. Raises ValueError as `control`.
    """
    if isinstance(prior, GridLaw):
        if order is not None:
            raise ValueError(f"a prior on a grid has its own nodes, got order {order}; leave it out")
        fine, coarse = (_grid_values(law, reward, alpha, schedule, x, t) for law in (prior, prior.coarser()))
        return Estimate(*fine, "grid", max(map(len, prior.axes)), _distance(fine, coarse))
    route = chosen_route(prior, reward)
    if route == "closed":
        laws, _ = conditionals(prior, reward, alpha, schedule, t, route, None)
        values = _together(_closed_values(law) for law in laws(x))
        score_difference = control(prior, reward, alpha, schedule, x, t, route=route)
        return Estimate(*values, route, None, _distance(values[:1], (score_difference,)))
    finest = 2 * default_order(route, reward, prior.dim) if order is None else order
    fine, coarse = (
        _together(_rule_values(law) for law in conditionals(prior, reward, alpha, schedule, t, route, nodes)[0](x))
        for nodes in (finest, finest // 2)
    )
    return Estimate(*fine, route, finest, _distance(fine, coarse))


def _closed_values(law: Conditional) -> _Values:
    u, ubar = law.tilted_mean(), law.reward_covariance()
    return u, ubar, u - ubar, law.log_expectation(), law.expectation()


def _rule_values(law: Conditional) -> _Values:
    u, ubar = law.tilted_mean_by_quadrature(), law.reward_covariance_by_quadrature()
    return u, ubar, u - ubar, law.log_expectation(), law.expectation()


def _grid_values(prior: GridLaw, reward: Reward, alpha: Alpha, schedule: NoiseSchedule, x: Tensor, t: Time) -> _Values:
    law = GridConditional.at(prior, reward, alpha, schedule, x, t)
    u, ubar = law.control(), law.jensen_control()
    return u, ubar, u - ubar, law.log_expectation(), law.expectation()


def _together(chunks: Iterator[_Values]) -> _Values:
    u, ubar, gap, log_expectation, expectation = (torch.cat(part) for part in zip(*chunks, strict=True))
    return u, ubar, gap, log_expectation, expectation


def _distance(fine: tuple[Tensor, ...], coarse: tuple[Tensor, ...]) -> float:
    return max(float((a - b).abs().max()) if len(a) else 0.0 for a, b in zip(fine, coarse, strict=True))
