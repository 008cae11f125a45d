"""Which expert a sample follows at a step, when one expert is drawn a step (MATH.md 6).

All randomness derives from the sample's phase, so that draws depend neither on batch nor on order. Probabilities
are the same for all samples, as numbers or a tensor (m,), or have rows: (1, m), or one law a sample, (n, m).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dbtheory.random import uniform

Probabilities = Sequence[float] | Float[Tensor, "m"] | Float[Tensor, "rows m"]


def independent_choice(probabilities: Probabilities, index: int, phase: Float[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """Draws from the categorical law, independent over samples and steps: a hash of phase and step."""
    edges = _as_tensor(probabilities, phase).cumsum(-1)[..., :-1]
    return (edges <= uniform(phase, index + 1).unsqueeze(-1)).sum(-1)


def rotation_choice(probabilities: Probabilities, index: int, phase: Float[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """The low-discrepancy order: expert 0 at step k iff `floor((k+1) w + U) > floor(k w + U)` (MATH.md 6).

    More than two experts nest: the steps that expert 0 leaves are counted on their own and split again, with
    an independent phase, so that each draw keeps the exact law and every prefix holds each expert in
    proportion. For probabilities that do not change over the steps. Experts of probability 0 take no part: a sample
    draws the same beside samples that use them.
    """
    law = _as_tensor(probabilities, phase)
    phases = torch.stack([_level_phase(phase, level) for level in range(law.shape[-1])])
    # each sample counts its levels over the experts that it uses
    levels = (law > 0).cumsum(-1).sub(1).clamp(min=0).expand(len(phase), -1)
    choice = torch.full(phase.shape, law.shape[-1] - 1, dtype=torch.int64, device=phase.device)
    undecided = torch.ones_like(choice, dtype=torch.bool)
    k = torch.full_like(choice, index).to(torch.float64)  # in float64, or k w would be rounded to float32
    for expert, w in enumerate(_conditional(law)):
        u = phases.gather(0, levels[:, expert].unsqueeze(0)).squeeze(0)
        before = torch.floor(k * w + u)
        taken = torch.floor((k + 1) * w + u) > before
        choice = torch.where(undecided & taken, expert, choice)
        undecided &= ~taken
        k = k - before
    return choice


def changing_rotation_choice(history: Float[Tensor, "steps rows m"], phase: Float[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """`rotation_choice` at the last of these steps, for probabilities that change over them.

    With `W_k` the sum of expert 0's probabilities before step k, it is taken iff `floor(W_(k+1) + U) > floor(W_k +
    U)`; each further level sums its conditional probability over the steps that were left to it. Each draw keeps
    the law of its step, and for two experts every count stays within 1 of its sum of probabilities; for more, the
    bound also grows with how much the conditional probabilities vary.
    """
    law = history.to(phase.device, torch.float64)
    choice = torch.full((len(law), len(phase)), law.shape[-1] - 1, dtype=torch.int64, device=phase.device)
    undecided = torch.ones_like(choice, dtype=torch.bool)
    for level, w in enumerate(_conditional(law)):
        u = _level_phase(phase, level)
        after = torch.floor((w * undecided).cumsum(0) + u)
        taken = after.diff(dim=0, prepend=torch.zeros_like(after[:1])) > 0
        choice = torch.where(taken, level, choice)
        undecided &= ~taken
    return choice[-1]


def _conditional(law: Tensor) -> list[Tensor]:
    """The probability of each expert but the last, given that no expert before it was taken; 1 where none can be."""
    experts = law.unbind(-1)
    remaining, levels = sum(experts), []
    for p in experts[:-1]:
        levels.append(torch.where(p < remaining, p / remaining, 1.0))
        remaining = remaining - p
    return levels


def _level_phase(phase: Tensor, level: int) -> Tensor:
    return phase.to(torch.float64) if level == 0 else uniform(phase, -level)


def _as_tensor(probabilities: Probabilities, phase: Tensor) -> Tensor:
    return torch.as_tensor(probabilities, dtype=torch.float64, device=phase.device)
