"""Families of toys along one number: the angle between two rewards, and the dimension."""

import itertools
import math
from dataclasses import replace

import torch

from dbtheory.reward import LinearReward
from dbtheory.schedule import VPLinear
from toys.mixtures import isotropic
from toys.toy import Toy, linear

FIRST, SECOND = "first", "second"


def conflicting(toy: Toy, angle: float, scale: float = 1.0) -> Toy:
    """The toy's prior under two linear rewards that stand `angle` degrees apart, at `scale` times its alpha.

    At scale 1 a reward moves a Gaussian of the prior's mean variance by one standard deviation; at angle 0 the
    rewards agree, at 180 they are opposite. ValueError on a line, which has no angles.
    """
    if toy.dim < 2:
        raise ValueError(f"rewards on a line have no angle between them, received the toy {toy.name!r}")
    strength = toy.alpha / math.sqrt(float(toy.prior.covariance.diagonal().mean()))
    rewards = {}
    for name, turn in ((FIRST, 0.0), (SECOND, math.radians(angle))):
        direction = torch.zeros(toy.dim, dtype=torch.float64)
        direction[0], direction[1] = strength * math.cos(turn), strength * math.sin(turn)
        rewards[name] = LinearReward(direction)
    return replace(toy, rewards=rewards, alpha=scale * toy.alpha)


def two_modes_power(dim: int) -> Toy:
    """`dim` independent coordinates, each with two modes, under rewards that pull all of them right, or left.

    Every coordinate is the same problem, so that a method that acts on each alone has the same sliced error in
    every dimension; 2^dim components.
    """
    prior = isotropic([list(corner) for corner in itertools.product((-1.5, 1.5), repeat=dim)], deviation=0.5)
    rewards = {"right": linear(*[1.0] * dim), "left": linear(*[-1.0] * dim)}
    return Toy(f"two-modes to the power {dim}", prior, rewards, 1.0, VPLinear())
