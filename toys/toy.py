"""What a toy problem is, and the rewards that they share."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dbtheory.law import Law
from dbtheory.reward import LinearReward, QuadraticReward, Reward
from dbtheory.schedule import NoiseSchedule


@dataclass(frozen=True)
class Toy:
    """A problem whose targets `prior exp(r / alpha) / Z` are known for every preference.

    `discretisation_error` is 0 where the prior is what its docstring says; where it stands for a continuous
    law, it is the total variation between it and the same construction with twice as many components.
    """

    name: str
    prior: Law
    rewards: Mapping[str, Reward]
    alpha: float
    schedule: NoiseSchedule
    discretisation_error: float = 0.0

    @property
    def dim(self) -> int:
        """Coordinates of a point."""
        return len(self.prior.mean)


def toward(*point: float, strength: float) -> QuadraticReward:
    """`-strength/2 |x - point|^2`."""
    centre = vector(*point)
    curvature = strength * torch.eye(len(point), dtype=torch.float64)
    return QuadraticReward(curvature, strength * centre, -0.5 * strength * float(centre @ centre))


def linear(*direction: float) -> LinearReward:
    """`<direction, x>`."""
    return LinearReward(vector(*direction))


def vector(*values: float) -> Tensor:
    """A float64 tensor of these numbers."""
    return torch.tensor(values, dtype=torch.float64)
