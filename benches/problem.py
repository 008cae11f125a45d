"""What is timed: a mixture with full covariances, and points around it."""

import torch
from torch import Tensor

from dbtheory import GaussianMixture


def gaussian_mixture(components: int, dim: int, seed: int = 0) -> GaussianMixture:
    """Components of unequal weight, their means a few standard deviations apart; float64."""
    generator = torch.Generator().manual_seed(seed)
    weights = 0.1 + torch.rand(components, generator=generator, dtype=torch.float64)
    means = 4 * torch.randn(components, dim, generator=generator, dtype=torch.float64)
    factors = torch.randn(components, dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    covariances = factors @ factors.mT + 0.3 * torch.eye(dim, dtype=torch.float64)
    return GaussianMixture(weights / weights.sum(), means, covariances)


def points(count: int, dim: int, seed: int = 1) -> Tensor:
    """`(count, dim)` points about where the mixture is; float64. In place, so that memory peaks at their size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64).mul_(4)
