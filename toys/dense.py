"""The toys whose prior is no small mixture: noisy curves as many narrow components, and a law on a grid.

A noisy curve is the law of `curve(u) + thickness z` with u uniform. Each piece of it becomes one component with
the piece's own mean and covariance, so that the error falls with the square of the number of pieces; it is
measured, and told as the toy's `discretisation_error`.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from dbtheory.grid import GridLaw
from dbtheory.metrics import total_variation
from dbtheory.mixture import GaussianMixture
from dbtheory.reward import FunctionReward, RBFReward
from dbtheory.schedule import VPLinear
from toys.toy import Toy, linear, toward, vector

Curve = Callable[[Tensor], Tensor]  # (m,) in [0, 1] -> (m, 2)
HALF_WIDTH = 5.0


def two_moons(name: str) -> Toy:
    """2-D: two interleaved half circles; one reward pulls up, one into the lower moon's belly."""
    moons: list[Curve] = [
        lambda u: torch.stack([2 * torch.cos(math.pi * u) - 1, 2 * torch.sin(math.pi * u) - 0.5], dim=-1),
        lambda u: torch.stack([1 - 2 * torch.cos(math.pi * u), 0.5 - 2 * torch.sin(math.pi * u)], dim=-1),
    ]
    rewards = {"up": linear(-0.5, 1.5), "lower": toward(1.5, -1.0, strength=1.0)}
    return _noisy_curves(name, moons, 12, 0.2, rewards)


def pinwheel(name: str) -> Toy:
    """2-D: five spiral arms; rewards pull south and to the north-west; a bounded one has bumps at two arms' ends."""

    def arm(offset: float) -> Curve:
        def curve(u: Tensor) -> Tensor:
            radius = 0.4 + 2.4 * u
            angle = offset + 0.45 * radius
            return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)

        return curve

    bumps = RBFReward(torch.stack([vector(0.85, 2.65), vector(-2.25, 1.65)]), vector(0.8, 0.8), vector(2.5, 1.5))
    rewards = {"south": linear(0.2, -0.8), "north-west": toward(-1.0, 2.0, strength=0.8), "bumps": bumps}
    return _noisy_curves(name, [arm(2 * math.pi * k / 5) for k in range(5)], 6, 0.18, rewards)


def swiss_roll(name: str) -> Toy:
    """2-D: a spiral of one and a quarter turns; one reward pulls to the right, one to a turn on the left."""

    def roll(u: Tensor) -> Tensor:
        # uniform along the spiral: arc length grows with the square of the angle
        angle = (1 + 8 * u).sqrt() * 1.25 * math.pi
        radius = 0.24 * angle
        return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)

    rewards = {"right": linear(1.2, 0.3), "left": toward(-1.2, 0.6, strength=1.0)}
    return _noisy_curves(name, [roll], 36, 0.15, rewards)


def checkerboard(name: str) -> Toy:
    """2-D: the squares of one colour, with soft edges; rewards: east, a bounded bump, and a cross that has kinks."""

    def log_density(x: Tensor) -> Tensor:
        board = logsigmoid(12 * torch.sin(math.pi * x / 1.25).prod(-1))
        return board + logsigmoid(12 * (2.5 - x.abs())).sum(-1)

    prior = GridLaw.from_density(log_density, [-3.2, -3.2], [3.2, 3.2], [129, 129])
    rewards = {
        "east": linear(0.8, 0.2),
        "bump": RBFReward(vector(-1.9, 0.6)[None], vector(1.0), vector(2.5)),
        "cross": FunctionReward(lambda x: -1.5 * x.abs().amin(-1)),
    }
    return Toy(name, prior, rewards, 1.0, VPLinear(), prior.discretisation_error)


def _noisy_curves(name: str, curves: Sequence[Curve], pieces: int, thickness: float, rewards: dict) -> Toy:
    prior, finer = (along_curves(curves, count, thickness) for count in (pieces, 2 * pieces))
    box = [-HALF_WIDTH] * 2, [HALF_WIDTH] * 2, [201, 201]
    return Toy(name, prior, rewards, 1.0, VPLinear(), total_variation(prior, finer, *box))


def along_curves(curves: Sequence[Curve], pieces: int, thickness: float) -> GaussianMixture:
    """`curve(u) + thickness z`, each curve and u uniform, by one component a piece with the piece's moments."""
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(8))
    u = (torch.arange(pieces).unsqueeze(-1) + 0.5 * (nodes + 1)) / pieces  # (pieces, 8)
    points = torch.cat([curve(u.flatten()).reshape(pieces, len(nodes), 2) for curve in curves])
    means, covariances = _moments(points, 0.5 * weights)
    covariances = covariances + thickness**2 * torch.eye(2, dtype=torch.float64)
    return GaussianMixture(torch.full((len(means),), 1.0 / len(means), dtype=torch.float64), means, covariances)


def _moments(
    points: Float[Tensor, "k q d"], weights: Float[Tensor, " q"]
) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k d d"]]:
    means = torch.einsum("q,kqd->kd", weights, points)
    offsets = points - means.unsqueeze(1)
    return means, torch.einsum("q,kqi,kqj->kij", weights, offsets, offsets)
