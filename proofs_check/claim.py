"""What a claim's file yields: measurements, each beside the bound that it has to meet.

A claim is a module of this package. Its docstring states it in our words, `SOURCE` says where it stands in the
paper, and `check()` yields one `Row` for each thing measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

HOLDS, FAILS, REFUTED = "holds", "FAILS", "does not hold as printed"


@dataclass(frozen=True)
class Row:
    """`measured <= bound` or `measured >= bound` (`sense`), for `what` in a few words, plain text.

    `refutes=True`: the inequality is the counterexample to a statement that the paper prints, so that meeting
    it means that the statement does not hold.
    """

    what: str
    measured: float
    bound: float
    sense: Literal["<=", ">="] = "<="
    refutes: bool = False

    @property
    def met(self) -> bool:
        """Whether the inequality holds; a NaN meets nothing."""
        # numpy's comparisons give a bool of its own
        return bool(self.measured <= self.bound if self.sense == "<=" else self.measured >= self.bound)

    @property
    def margin(self) -> float:
        """How many times better than the bound: above 1 where it is met (both are non-negative)."""
        better, worse = (self.bound, self.measured) if self.sense == "<=" else (self.measured, self.bound)
        if worse == 0:
            return math.inf if better > 0 else 1.0
        return better / worse

    @property
    def verdict(self) -> str:
        if not self.met:
            return FAILS
        return REFUTED if self.refutes else HOLDS
