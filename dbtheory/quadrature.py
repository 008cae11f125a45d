"""Tensor Gauss-Hermite rules for standard normal expectations."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_MAX_POINTS = 10**6


def gauss_hermite(order: int, dim: int, like: Tensor) -> tuple[Float[Tensor, "m d"], Float[Tensor, " m"]]:
    """Points and log weights with `sum_j exp(log_weights[j]) h(points[j]) = E[h(z)]`, `z ~ N(0, I)` in `dim`
    dimensions.

    Exact for polynomials of degree below `2 order` in each coordinate; `m = order ** dim`. They have the
    dtype and device of `like`. ValueError for an order below 1 or more than a million points.
    """
    if order < 1 or order**dim > _MAX_POINTS:
        raise ValueError(
            f"Gauss-Hermite needs 1 <= order and order ** dim <= {_MAX_POINTS}, got order {order} in {dim} "
            "dimensions; lower the order, or use a closed form"
        )
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    line = torch.from_numpy(nodes).to(like)
    log_weights = torch.from_numpy(np.log(weights / weights.sum())).to(like)
    points = torch.cartesian_prod(*[line] * dim).reshape(-1, dim)
    products = torch.cartesian_prod(*[log_weights] * dim).reshape(-1, dim)
    return points, products.sum(-1)
