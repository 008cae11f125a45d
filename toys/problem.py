"""A toy with a preference: the exact target, the experts, and distances to the target."""

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce

import torch
from torch import Tensor

from dbtheory import ExactExperts, Preference, tilt
from dbtheory.law import Law
from dbtheory.metrics import SlicedW2
from dbtheory.preference import BASE
from dbtheory.reward import Reward
from toys.soup import NetworkExperts
from toys.toy import Toy

POOL = 8
FLOORS = 4
PROJECTIONS = 64


@dataclass(frozen=True)
class Budget:
    """Samples, steps and seed: methods under one budget share their starting points and noise."""

    samples: int = 4000
    steps: int = 100
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Problem:
    """`toy` under the preference `weights`, which name the rewards in use, and `kl_scale`.

    `networks`, where there are any, stand for the toy's base and for an expert of each reward in use.
    """

    toy: Toy
    weights: Mapping[str, float]
    kl_scale: float = 1.0
    networks: NetworkExperts | None = field(default=None, repr=False)

    @cached_property
    def preference(self) -> Preference:
        """The preference over the rewards in use."""
        return Preference(self.weights, kl_scale=self.kl_scale)

    @cached_property
    def combined(self) -> Reward:
        """`lambda sum_i w_i r_i`, the reward that the exact target is tilted by."""
        return _sum(self.kl_scale * w * self.toy.rewards[name] for name, w in self.weights.items())

    @cached_property
    def target(self) -> Law:
        """`prior exp(combined / alpha) / Z`."""
        return tilt(self.toy.prior, self.combined, self.toy.alpha)

    @cached_property
    def rewards(self) -> dict[str, Reward]:
        """The rewards in use, by name."""
        return {name: self.toy.rewards[name] for name in self.weights}

    @cached_property
    def midpoints(self) -> dict[tuple[str, str], str]:
        """The edges between vertices with a coefficient, and the name of the expert at their middle."""
        vertices = [name for name, c in self.preference.coefficients().items() if c != 0]
        return {(a, b): f"{a}|{b}" for i, a in enumerate(vertices) for b in vertices[i + 1 :]}

    def experts(self, rewards: Mapping[str, Reward] | None = None) -> ExactExperts:
        """The exact experts of these rewards; of those in use where none are given."""
        return ExactExperts(self.toy.prior, rewards or self.rewards, self.toy.alpha, self.toy.schedule)

    @cached_property
    def midpoint_rewards(self) -> dict[str, Reward]:
        """The mean of each edge's two rewards (the base's is 0), by the name of the edge's middle."""
        return {
            name: _sum(0.5 * self.rewards[end] for end in edge if end != BASE) for edge, name in self.midpoints.items()
        }

    def midpoint_experts(self) -> ExactExperts:
        """The exact experts of the rewards in use and of the edges' middles."""
        return self.experts(self.rewards | self.midpoint_rewards)

    def distances(self, draws: Mapping[str, Tensor], budget: Budget) -> dict[str, float]:
        """Sliced W2 of each sample to the exact target, and as "floor" that of independent draws of the target.

        The target stands as a draw 8 times as large, so that the noise left is the samples' own. A distance near
        the floor cannot be told from none.
        """
        generator = torch.Generator().manual_seed(budget.seed)
        reference = self.target.sample(POOL * budget.samples, generator=generator)
        distance = SlicedW2(reference, projections=PROJECTIONS)
        floors = [distance(self.target.sample(budget.samples, generator=generator)) for _ in range(FLOORS)]
        return {"floor": math.hypot(*floors) / FLOORS**0.5} | {name: distance(x) for name, x in draws.items()}


def _sum(rewards: Iterable[Reward]) -> Reward:
    return reduce(operator.add, rewards)
