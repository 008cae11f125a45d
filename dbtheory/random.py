"""Counter-based uniforms: every random choice of a sample is a function of its own phase and a counter.

A stateful generator would make a sample's choices depend on its place in a batch. A hash does not: results
are the same in any batch, order or chunking, and a phase that travels with a sample carries all of its future
choices.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

# Constants of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniform(phase: Float[Tensor, " n"], salt: int) -> Float[Tensor, " n"]:
    """Uniforms on [0, 1), one for each phase, independent over phases and over salts (splitmix64).

    `phase (n,)` are floats that tell samples apart; `salt` is any integer, the counter. Returns float64
    `(n,)`.
    """
    bits = phase.to(torch.float64).contiguous().view(torch.int64)
    hashed = _mix(_mix(bits) + _signed(salt * GOLDEN))
    return _shift_right(hashed, 11).to(torch.float64) * 2.0**-53


def _mix(z: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    z = (z ^ _shift_right(z, 30)) * _signed(MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(MIX_2)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Int64[Tensor, " n"], bits: int) -> Int64[Tensor, " n"]:
    """Logical shift: torch's own copies the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same low 64 bits, for torch's wrap-around arithmetic."""
    return (value + 2**63) % 2**64 - 2**63
