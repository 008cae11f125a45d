"""Which expert a sample follows at a step, when one expert is drawn a step (MATH.md 6).

All randomness derives from the sample's phase, so that draws depend neither on batch nor on order.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dbtheory.random import uniform


def independent_choice(probabilities: Sequence[float], index: int, phase: Float[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """Draws from the categorical law, independent over samples and steps: a hash of phase and step."""
    edges = torch.tensor(probabilities, dtype=torch.float64, device=phase.device).cumsum(0)[:-1]
    return torch.searchsorted(edges, uniform(phase, index + 1), right=True)


def rotation_choice(probabilities: Sequence[float], index: int, phase: Float[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """The low-discrepancy order: expert 0 at step k iff `floor((k+1) w + U) > floor(k w + U)` (MATH.md 6).

    More than two experts nest: the steps that expert 0 leaves are counted on their own and split again, with
    an independent phase, so that each draw keeps the exact law and every prefix holds each expert in
    proportion.
    """
    choice = torch.full(phase.shape, len(probabilities) - 1, dtype=torch.int64, device=phase.device)
    undecided = torch.ones_like(choice, dtype=torch.bool)
    k = torch.full_like(choice, index)
    remaining = sum(probabilities)
    for level, probability in enumerate(probabilities[:-1]):
        w = probability / remaining
        u = phase.to(torch.float64) if level == 0 else uniform(phase, -level)
        before = torch.floor(k * w + u).long()
        taken = torch.floor((k + 1) * w + u).long() > before
        choice = torch.where(undecided & taken, level, choice)
        undecided &= ~taken
        k = k - before
        remaining -= probability
    return choice
