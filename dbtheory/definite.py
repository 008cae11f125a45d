"""Whether a symmetric matrix is positive definite, when rounding is counted against it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def definite_cholesky(
    matrices: Float[Tensor, "*n d d"], terms: Float[Tensor, "*n d"]
) -> Float[Tensor, "*n d d"] | None:
    """Lower Cholesky factors, or None where one of the matrices is not positive definite.

    `terms` is the size of what each diagonal entry was summed from: terms that cancel leave rounding, and a pivot that
    is no larger counts as 0.
    """
    cholesky, failed = torch.linalg.cholesky_ex(matrices)
    pivots = cholesky.diagonal(dim1=-2, dim2=-1).square()
    rounding = 16 * torch.finfo(matrices.dtype).eps * terms
    return None if bool((failed.bool() | (pivots <= rounding).any(-1)).any()) else cholesky
