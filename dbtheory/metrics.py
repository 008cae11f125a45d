"""Distances between samples and targets, and between laws. POT computes the optimal transport."""

from collections.abc import Sequence

import numpy as np
import ot
import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.law import Density, Law


def sliced_w2(x: Float[Tensor, "n d"], y: Float[Tensor, "m _"], *, projections: int = 200, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of two samples: root mean square of the 1-D distances.

    The directions depend on `seed` and d alone, so that distances under one seed are comparable.
    """
    return SlicedW2(y, projections=projections, seed=seed)(x)


class SlicedW2:
    """Sliced 2-Wasserstein distance to one reference sample `y` (m, d), whose projections are sorted once.

    `SlicedW2(y)(x)` for x (n, d) is `sliced_w2(x, y)`. A reference of k n points, large enough, leaves the noise of
    x alone. ValueError for samples of another dimension.
    """

    def __init__(self, y: Float[Tensor, "m d"], *, projections: int = 200, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(y.shape[-1], projections, generator=generator, dtype=torch.float64)
        self.directions: np.ndarray = (directions / directions.norm(dim=0)).numpy()
        self.reference: np.ndarray = self._sorted(y)  # (projections, m)

    def __call__(self, x: Float[Tensor, "n _"]) -> float:
        """The distance of x (n, d) to the reference."""
        if x.shape[-1] != len(self.directions):
            raise ValueError(f"samples must share their dimension, received {x.shape[-1]} and {len(self.directions)}")
        projected = self._sorted(x)
        copies, rest = divmod(self.reference.shape[1], len(x))
        if rest:
            return float(np.sqrt(np.mean(ot.wasserstein_1d(projected.T, self.reference.T, p=2))))
        # the general solver's weights cost ten times the sorts that equal sizes, or multiples, need
        difference = self.reference.reshape(len(projected), len(x), copies) - projected[:, :, None]
        return float(np.sqrt(np.mean(difference**2)))

    def _sorted(self, points: Tensor) -> np.ndarray:
        return np.sort((_array(points) @ self.directions).T)


def w2_1d(x: Float[Tensor, " n"], y: Float[Tensor, " m"]) -> float:
    """Exact 2-Wasserstein distance of two samples on the line (quantile coupling)."""
    return np.sqrt(np.asarray(ot.wasserstein_1d(_array(x), _array(y), p=2))).item()


def gaussian_w2(
    mean_1: Float[Tensor, " d"],
    cov_1: Float[Tensor, "d d"],
    mean_2: Float[Tensor, " d"],
    cov_2: Float[Tensor, "d d"],
) -> float:
    """2-Wasserstein distance of two Gaussians (Bures metric)."""
    distance = ot.gaussian.bures_wasserstein_distance(_array(mean_1), _array(mean_2), _array(cov_1), _array(cov_2))
    return np.asarray(distance).item()


def kl_estimate(p: Law, q: Law, n: int, generator: torch.Generator) -> tuple[float, float]:
    """Monte Carlo estimate of `KL(p || q)` from `n` draws of p, and its standard error."""
    x = p.sample(n, generator=generator)
    ratio = p.log_prob(x) - q.log_prob(x)
    return float(ratio.mean()), float(ratio.std() / n**0.5)


def total_variation(
    p: Density, q: Density, low: Sequence[float], high: Sequence[float], counts: Sequence[int]
) -> float:
    """`1/2 int |p - q|` by the trapezoid rule on a regular grid over the box; mass outside is not seen.

    Raises ValueError where low, high and counts disagree in length, or an axis is empty.
    """
    if (
        not len(low) == len(high) == len(counts)
        or min(counts) < 2
        or any(a >= b for a, b in zip(low, high, strict=True))
    ):
        raise ValueError(f"a box needs low < high and counts >= 2 for each axis, received {low}, {high}, {counts}")
    axes = [torch.linspace(a, b, k, dtype=torch.float64) for a, b, k in zip(low, high, counts, strict=True)]
    points = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    difference = (p.log_prob(points).exp() - q.log_prob(points).exp()).abs().reshape(*counts)
    for axis in reversed(axes):
        difference = torch.trapezoid(difference, axis)
    return 0.5 * float(difference)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().to("cpu", torch.float64).numpy()
