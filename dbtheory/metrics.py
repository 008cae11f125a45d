"""Distances between samples and targets. POT computes the optimal transport."""

import numpy as np
import ot
import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.mixture import GaussianMixture


def sliced_w2(x: Float[Tensor, "n d"], y: Float[Tensor, "m _"], *, projections: int = 200, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of two samples: root mean square of the 1-D distances.

    The directions depend on `seed` and d alone, so that distances under one seed are comparable.
    """
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"samples must share their dimension, received {tuple(x.shape)} and {tuple(y.shape)}")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(x.shape[-1], projections, generator=generator, dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).numpy()
    left, right = (_array(points) @ directions for points in (x, y))
    if left.shape == right.shape:
        # the general solver's weights cost ten times the two sorts that equal sizes need
        difference = np.sort(left.T) - np.sort(right.T)
        return float(np.sqrt(np.mean(difference**2)))
    return float(np.sqrt(np.mean(ot.wasserstein_1d(left, right, p=2))))


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


def kl_estimate(p: GaussianMixture, q: GaussianMixture, n: int, generator: torch.Generator) -> tuple[float, float]:
    """Monte Carlo estimate of `KL(p || q)` from `n` draws of p, and its standard error."""
    x = p.sample(n, generator=generator)
    ratio = p.log_prob(x) - q.log_prob(x)
    return float(ratio.mean()), float(ratio.std() / n**0.5)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().to("cpu", torch.float64).numpy()
