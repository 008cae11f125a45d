"""Weights and KL scales that change with progress, as users write them: `0.2->0.8`, `0->1->0.5`."""

import math
from bisect import bisect_right
from dataclasses import dataclass

ARROW = "->"


@dataclass(frozen=True)
class PiecewiseLinear:
    """A function of progress (0 at noise, 1 at data): linear between `values` at equal distances, two at least."""

    values: tuple[float, ...]

    @property
    def knots(self) -> tuple[float, ...]:
        """The progress of each value."""
        return tuple(i / (len(self.values) - 1) for i in range(len(self.values)))

    def __call__(self, progress: float) -> float:
        """The value at `progress` in [0, 1]; at a knot exactly that knot's."""
        knots = self.knots
        i = min(bisect_right(knots, progress), len(knots) - 1)
        share = (progress - knots[i - 1]) / (knots[i] - knots[i - 1])
        return (1 - share) * self.values[i - 1] + share * self.values[i]

    def __str__(self) -> str:
        return ARROW.join(f"{value!r}" for value in self.values)


Amount = float | PiecewiseLinear


def parse_amount(what: str, text: str) -> Amount:
    """`"0.7"` as a number, `"0.2->0.8"` as a function of progress; ValueError, which names `what`, for anything else.

    The numbers are finite; signs and sums are the preference's business.
    """
    parts = text.split(ARROW)
    values = tuple(_number(what, part, text) for part in parts)
    return values[0] if len(values) == 1 else PiecewiseLinear(values)


def _number(what: str, part: str, text: str) -> float:
    try:
        # python reads digits of every script, and 1_000: in a command line they are slips
        value = float(part) if part.isascii() and "_" not in part else None
    except ValueError:
        value = None
    if value is None:
        raise ValueError(f'{what} must be a number, or several as in "0.2{ARROW}0.8" (in quotes), received {text!r}')
    if not math.isfinite(value):
        raise ValueError(f"{what} must be finite, received {text!r}")
    return value
