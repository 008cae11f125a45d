"""The toys whose prior is a small Gaussian mixture: everything about them is exact."""

import math

import torch

from dbtheory.mixture import GaussianMixture
from dbtheory.reward import LinearReward, QuadraticReward
from dbtheory.schedule import VPLinear
from toys.toy import Toy, linear, toward, vector


def two_modes(name: str) -> Toy:
    """1-D: two modes that opposite linear rewards pull apart, and a third reward that pulls to the middle."""
    prior = isotropic([[-1.5], [1.5]], deviation=0.5)
    rewards = {"right": linear(1.0), "left": linear(-1.0), "centre": toward(0.0, strength=1.0)}
    return Toy(name, prior, rewards, 0.5, VPLinear())


def ring_of_six(name: str) -> Toy:
    """2-D: six modes on a circle; each reward prefers its own side of it."""
    angles = [math.pi * k / 3 for k in range(6)]
    prior = isotropic([[2.5 * math.cos(a), 2.5 * math.sin(a)] for a in angles], deviation=0.35)
    rewards = {"east": toward(2.0, 0.0, strength=1.0), "north": toward(-1.0, 2.0, strength=1.0)}
    return Toy(name, prior, rewards, 1.0, VPLinear())


def grid_of_nine(name: str) -> Toy:
    """2-D: nine modes; one reward prefers the right, one the top, one the centre."""
    prior = isotropic([[2.0 * i, 2.0 * j] for i in (-1, 0, 1) for j in (-1, 0, 1)], deviation=0.3)
    rewards = {
        "right": linear(1.0, 0.0),
        "top": linear(0.0, 1.0),
        "centre": toward(0.0, 0.0, strength=1.0),
    }
    return Toy(name, prior, rewards, 1.0, VPLinear())


def anisotropic(name: str) -> Toy:
    """2-D: two crossed, elongated components of unequal weight; one reward is a saddle (indefinite)."""
    covariances = torch.tensor([[[1.2, 0.9], [0.9, 0.9]], [[0.4, -0.3], [-0.3, 1.5]]], dtype=torch.float64)
    means = torch.tensor([[-1.5, 0.0], [1.5, 0.5]], dtype=torch.float64)
    prior = GaussianMixture(torch.tensor([0.6, 0.4], dtype=torch.float64), means, covariances)
    saddle = QuadraticReward(vector(-0.1, 0.4).diag(), vector(0.0, 0.0))
    return Toy(name, prior, {"saddle": saddle, "up": linear(0.3, 1.0)}, 1.0, VPLinear())


def mixture_8d(name: str) -> Toy:
    """8-D: five components with random means and covariances, and three rewards on different coordinates."""
    generator = torch.Generator().manual_seed(8)
    means = 1.5 * torch.randn(5, 8, generator=generator, dtype=torch.float64)
    factors = 0.3 * torch.randn(5, 8, 8, generator=generator, dtype=torch.float64)
    covariances = factors @ factors.mT + 0.2 * torch.eye(8, dtype=torch.float64)
    weights = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1], dtype=torch.float64)
    first, last = torch.eye(8, dtype=torch.float64)[[0, 7]]
    rewards = {
        "first": LinearReward(first),
        "against": LinearReward(0.5 * last - first),
        "origin": toward(*[0.0] * 8, strength=0.3),
    }
    return Toy(name, GaussianMixture(weights, means, covariances), rewards, 1.0, VPLinear())


def isotropic(means: list[list[float]], deviation: float) -> GaussianMixture:
    """Equally likely components `N(mean, deviation^2 I)`."""
    centres = torch.tensor(means, dtype=torch.float64)
    count, dimension = centres.shape
    covariances = deviation**2 * torch.eye(dimension, dtype=torch.float64).expand(count, -1, -1)
    return GaussianMixture(torch.full((count,), 1.0 / count, dtype=torch.float64), centres, covariances)
