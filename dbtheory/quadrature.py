"""Tensor rules for standard normal expectations: Gauss-Hermite for smooth functions, a lattice for any other.

Both return `points` (m, d) and `log_weights` (m,) with `sum_j exp(log_weights[j]) h(points[j])` close to `E[h(z)]`,
`z ~ N(0, I)` in `dim` dimensions, in the dtype and on the device of `like`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from scipy.special import roots_hermitenorm
from torch import Tensor

_MAX_POINTS = 10**6


_REACH = 8.5  # standard deviations that a lattice spans on each side: what lies beyond weighs 2e-17


def gauss_hermite(order: int, dim: int, like: Tensor) -> tuple[Float[Tensor, "m d"], Float[Tensor, " m"]]:
    """Exact for polynomials of degree below `2 order` in each coordinate; `m = order ** dim`.

    ValueError for an order below 1 or more than a million points.
    """
    _require_size("Gauss-Hermite", order, dim, least=1)
    nodes, weights = roots_hermitenorm(order)
    return _tensor_rule(torch.from_numpy(nodes).to(like), torch.from_numpy(weights).log().to(like), dim)


def lattice(order: int, dim: int, like: Tensor) -> tuple[Float[Tensor, "m d"], Float[Tensor, " m"]]:
    """The trapezoidal rule on [-8.5, 8.5] along each axis, in `order` steps: `m = (order + 1) ** dim`.

    Its error falls faster than any power of the step where h is smooth, and like the step itself where h jumps.
    Doubling the order keeps every node, so that halving the step moves the share of a jump by a quarter of the mass
    of a cell, and the rest of the error is no more than that. ValueError for an order below 2 or more than a million
    points.
    """
    _require_size("a lattice", order, dim, least=2)
    line = torch.linspace(-_REACH, _REACH, order + 1, dtype=torch.float64).to(like)
    return _tensor_rule(line, -0.5 * line.square(), dim)


def _tensor_rule(line: Tensor, log_weights: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The product over axes of one rule on a line, whose weights are normalised."""
    points = torch.cartesian_prod(*[line] * dim).reshape(-1, dim)
    products = torch.cartesian_prod(*[log_weights.log_softmax(0)] * dim).reshape(-1, dim)
    return points, products.sum(-1)


def _require_size(rule: str, order: int, dim: int, least: int) -> None:
    if order < least or order**dim > _MAX_POINTS:
        raise ValueError(
            f"{rule} needs {least} <= order and order ** dim <= {_MAX_POINTS}, got order {order} in {dim} "
            "dimensions; change the order, use a QuadraticReward, or say on which `directions` a SmoothReward depends"
        )
