"""What the tests of the bounds share: one small problem, and its posterior on a line from scipy alone."""

from collections.abc import Callable

import numpy as np
import torch
from scipy import integrate, optimize, stats
from torch import Tensor

from dbtheory.mixture import GaussianMixture
from dbtheory.reward import Reward, SmoothReward
from dbtheory.schedule import VPLinear

SCHEDULE, T, ALPHA = VPLinear(), 0.35, 0.8
STEP = 1e-4  # of finite differences in x and r


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def point(*coordinates: float) -> Tensor:
    """One point, (1, d)."""
    return torch.tensor([coordinates], dtype=torch.float64)


def bent() -> SmoothReward:
    """Strictly monotone and bent, of unlimited range."""
    return SmoothReward(lambda x: (0.7 * x + 0.5 * (2 * x).tanh()).squeeze(-1))


def gaussian(dim: int) -> GaussianMixture:
    """N(0, I)."""
    identity = torch.eye(dim, dtype=torch.float64)
    return GaussianMixture(torch.ones(1).double(), torch.zeros(1, dim).double(), identity[None])


def value(reward: Reward, x0: float) -> float:
    """R at a point of a line."""
    return float(reward(torch.tensor([x0], dtype=torch.float64))) / ALPHA


def root(function: Callable[[float], float]) -> float:
    """Where an increasing or decreasing function vanishes."""
    return float(optimize.root_scalar(function, bracket=(-60, 60), method="brentq", xtol=1e-14).root)


class Scipy:
    """The posterior on a line at one point, from densities and distribution functions of scipy alone."""

    def __init__(self, prior: GaussianMixture, x: float, t: float = T) -> None:
        a, s = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
        means, variances = prior.means[:, 0].numpy(), prior.covariances[:, 0, 0].numpy()
        total = a**2 * variances + s**2
        mass = prior.weights.numpy() * stats.norm.pdf(x, a * means, np.sqrt(total))
        self.weights = mass / mass.sum()
        self.means = means + a * variances / total * (x - a * means)
        self.deviations = np.sqrt(variances * s**2 / total)

    def pdf(self, x0: float) -> float:
        return float(self.weights @ stats.norm.pdf(x0, self.means, self.deviations))

    def quantile(self, omega: float) -> float:
        def excess(x0: float) -> float:
            return float(self.weights @ stats.norm.cdf(x0, self.means, self.deviations)) - omega

        return root(excess)

    def mean(self, function: Callable[[float], float]) -> float:
        breaks = sorted(self.means)
        low, high = breaks[0] - 14 * self.deviations.max(), breaks[-1] + 14 * self.deviations.max()
        return integrate.quad(lambda z: function(z) * self.pdf(z), low, high, points=breaks, epsabs=1e-12, limit=400)[0]
