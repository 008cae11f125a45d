"""What the user asks for: weights on the rewards, and how far to move from the base model."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

BASE = "base"
SUM_TOLERANCE = 1e-6


@dataclass(frozen=True, init=False)
class Preference:
    """Weights `w` on the simplex over named experts, and the KL scale `lambda` (MATH.md 2).

    The target is `p_base^(1 - lambda) prod_i p_i^(lambda w_i)`: `kl_scale=0` is the base model, 1 the aligned
    one, above 1 further than any expert was trained to go. Weights may miss 1 by 1e-6 in sum; they are
    renormalised.

    Raises:
        ValueError: no weights; a name that is "base"; a weight that is no number, NaN, infinite, or negative
            (unless `allow_negative`); a sum other than 1; a `kl_scale` that is NaN, infinite or negative.
    """

    names: tuple[str, ...]
    values: tuple[float, ...]
    kl_scale: float

    def __init__(self, weights: Mapping[str, Any], kl_scale: Any = 1.0, *, allow_negative: bool = False) -> None:
        if not weights:
            raise ValueError('a preference needs at least one weight, received none; e.g. Preference({"jpeg": 1.0})')
        if BASE in weights:
            raise ValueError(f'"{BASE}" takes no weight of its own; its coefficient is 1 - kl_scale, so set kl_scale')
        values = [_weight(name, value, allow_negative) for name, value in weights.items()]
        total = sum(values)
        if abs(total - 1.0) > SUM_TOLERANCE:
            raise ValueError(f"weights must sum to 1, received {_listing(weights)} with sum {total:.8g}; rescale them")
        scale = _number("kl_scale", kl_scale)
        if scale < 0:
            raise ValueError(f"kl_scale must be at least 0 (0 is the base model), received {scale}")
        object.__setattr__(self, "names", tuple(weights))
        object.__setattr__(self, "values", tuple(value / total for value in values))
        object.__setattr__(self, "kl_scale", scale)

    @property
    def weights(self) -> dict[str, float]:
        """The renormalised weights by name."""
        return dict(zip(self.names, self.values, strict=True))

    def coefficients(self) -> dict[str, float]:
        """`{"base": 1 - lambda, name: lambda w}`, which sum to 1; one-hot is exactly zeros and a one."""
        return {BASE: 1.0 - self.kl_scale} | {name: self.kl_scale * w for name, w in self.weights.items()}

    def validate(self, names: Iterable[str]) -> None:
        """Check the weights against the experts at hand (`names`, with or without "base").

        Raises:
            ValueError: a weight for an expert that is not there, or an expert without a weight (zero must be
                said).
        """
        known = [name for name in names if name != BASE]
        unknown = [name for name in self.names if name not in known]
        if unknown:
            raise ValueError(f"weight for unknown expert {_quoted(unknown)}; the experts are {_quoted(known)}")
        missing = [name for name in known if name not in self.names]
        if missing:
            raise ValueError(f"no weight for expert {_quoted(missing)}; give every expert one, 0 to leave it out")


def _weight(name: str, value: Any, allow_negative: bool) -> float:
    weight = _number(f'weight of "{name}"', value)
    if weight < 0 and not allow_negative:
        raise ValueError(f'weight of "{name}" is negative: {weight}; use at least 0, or say allow_negative=True')
    return weight


def _number(what: str, value: Any) -> float:
    try:
        # float("0.5") would work, but a weight that arrives as text is a parsing error of the caller
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{what} must be a finite number, received {value!r}")
    return number


def _listing(weights: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in weights.items())


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names) or "none"
