"""The toy problems: a Gaussian-mixture prior, two or three quadratic rewards in conflict, and a schedule."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dbtheory.mixture import GaussianMixture
from dbtheory.reward import LinearReward, QuadraticReward, Reward
from dbtheory.schedule import NoiseSchedule, VPLinear


@dataclass(frozen=True)
class Toy:
    """A problem whose targets `prior exp(r / alpha) / Z` are Gaussian mixtures for every preference."""

    name: str
    prior: GaussianMixture
    rewards: Mapping[str, Reward]
    alpha: float
    schedule: NoiseSchedule


def names() -> tuple[str, ...]:
    """The names that `get` knows."""
    return tuple(_BUILDERS)


def get(name: str) -> Toy:
    """The toy problem of that name, in float64 on the CPU. Raises ValueError for an unknown name."""
    if name not in _BUILDERS:
        raise ValueError(f"no toy named {name!r}; choose one of {', '.join(names())}")
    return _BUILDERS[name](name)


def _two_modes(name: str) -> Toy:
    """1-D: two modes that opposite linear rewards pull apart, and a third reward that pulls to the middle."""
    prior = _isotropic([[-1.5], [1.5]], deviation=0.5)
    rewards = {"right": _linear(1.0), "left": _linear(-1.0), "centre": _toward(0.0, strength=1.0)}
    return Toy(name, prior, rewards, 0.5, VPLinear())


def _ring_of_six(name: str) -> Toy:
    """2-D: six modes on a circle; each reward prefers its own side of it."""
    angles = [math.pi * k / 3 for k in range(6)]
    prior = _isotropic([[2.5 * math.cos(a), 2.5 * math.sin(a)] for a in angles], deviation=0.35)
    rewards = {"east": _toward(2.0, 0.0, strength=1.0), "north": _toward(-1.0, 2.0, strength=1.0)}
    return Toy(name, prior, rewards, 1.0, VPLinear())


def _grid_of_nine(name: str) -> Toy:
    """2-D: nine modes; one reward prefers the right, one the top, one the centre."""
    prior = _isotropic([[2.0 * i, 2.0 * j] for i in (-1, 0, 1) for j in (-1, 0, 1)], deviation=0.3)
    rewards = {
        "right": _linear(1.0, 0.0),
        "top": _linear(0.0, 1.0),
        "centre": _toward(0.0, 0.0, strength=1.0),
    }
    return Toy(name, prior, rewards, 1.0, VPLinear())


def _anisotropic(name: str) -> Toy:
    """2-D: two crossed, elongated components of unequal weight; one reward is a saddle (indefinite)."""
    covariances = torch.tensor([[[1.2, 0.9], [0.9, 0.9]], [[0.4, -0.3], [-0.3, 1.5]]], dtype=torch.float64)
    means = torch.tensor([[-1.5, 0.0], [1.5, 0.5]], dtype=torch.float64)
    prior = GaussianMixture(torch.tensor([0.6, 0.4], dtype=torch.float64), means, covariances)
    saddle = QuadraticReward(_vector(-0.1, 0.4).diag(), _vector(0.0, 0.0))
    return Toy(name, prior, {"saddle": saddle, "up": _linear(0.3, 1.0)}, 1.0, VPLinear())


def _mixture_8d(name: str) -> Toy:
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
        "origin": _toward(*[0.0] * 8, strength=0.3),
    }
    return Toy(name, GaussianMixture(weights, means, covariances), rewards, 1.0, VPLinear())


_BUILDERS: dict[str, Callable[[str], Toy]] = {
    "two-modes": _two_modes,
    "ring-of-six": _ring_of_six,
    "grid-of-nine": _grid_of_nine,
    "anisotropic": _anisotropic,
    "mixture-8d": _mixture_8d,
}


def _isotropic(means: list[list[float]], deviation: float) -> GaussianMixture:
    centres = torch.tensor(means, dtype=torch.float64)
    count, dimension = centres.shape
    covariances = deviation**2 * torch.eye(dimension, dtype=torch.float64).expand(count, -1, -1)
    return GaussianMixture(torch.full((count,), 1.0 / count, dtype=torch.float64), centres, covariances)


def _toward(*point: float, strength: float) -> QuadraticReward:
    """`-strength/2 |x - point|^2`."""
    centre = _vector(*point)
    curvature = strength * torch.eye(len(point), dtype=torch.float64)
    return QuadraticReward(curvature, strength * centre, -0.5 * strength * float(centre @ centre))


def _linear(*direction: float) -> LinearReward:
    return LinearReward(_vector(*direction))


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
