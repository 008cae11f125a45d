"""What the user asks for: weights on the rewards, and how far to move from the base model."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BASE = "base"
SUM_TOLERANCE = 1e-6
# where functions of progress are tried at construction, so that a bad one is refused before any long work
PROBES = (0.0, 0.5, 1.0)

Amount = float | Tensor  # one for all samples, or (n,): one for each
Weight = Amount | Callable[[float], Any]


@dataclass(frozen=True, init=False, eq=False)
class Preference:
    """Weights `w` on the simplex over named experts, and the KL scale `lambda` (MATH.md 2).

    The target is `p_base^(1 - lambda) prod_i p_i^(lambda w_i)`: `kl_scale=0` is the base model, 1 the aligned
    one, above 1 further than any expert was trained to go. Weights may miss 1 by 1e-6 in sum; they are
    renormalised.

    Each weight, and `kl_scale`, is a number, a tensor `(n,)` with one number a sample, or a function of the
    progress of generation (0 at noise, 1 at data) that returns either.

    Raises:
        ValueError: no weights; a name that is "base"; a weight that is no number, NaN, infinite, or negative
            (unless `allow_negative`); a sum other than 1; a `kl_scale` that is NaN, infinite or negative; tensors
            of different lengths. Functions are tried at progress 0, 1/2 and 1, and checked again at every step.
    """

    names: tuple[str, ...]
    values: tuple[Weight, ...]
    kl_scale: Weight
    allow_negative: bool

    def __init__(self, weights: Mapping[str, Any], kl_scale: Any = 1.0, *, allow_negative: bool = False) -> None:
        if not weights:
            raise ValueError('a preference needs at least one weight, received none; e.g. Preference({"jpeg": 1.0})')
        if BASE in weights:
            raise ValueError(f'"{BASE}" takes no weight of its own; its coefficient is 1 - kl_scale, so set kl_scale')
        values = [_weight(name, value, allow_negative) for name, value in weights.items()]
        scale = _scale(kl_scale)
        object.__setattr__(self, "names", tuple(weights))
        object.__setattr__(self, "kl_scale", scale)
        object.__setattr__(self, "allow_negative", allow_negative)
        if any(callable(value) for value in (*values, scale)):
            object.__setattr__(self, "values", tuple(values))
            for progress in PROBES:
                self.at(progress)
        else:
            _common_length(dict(zip((*weights, "kl_scale"), (*values, scale), strict=True)))
            object.__setattr__(self, "values", _normalised(weights, values))

    @property
    def weights(self) -> dict[str, Weight]:
        """The renormalised weights by name; functions as they were given."""
        return dict(zip(self.names, self.values, strict=True))

    @property
    def is_constant(self) -> bool:
        """Whether it is the same at every step: no weight, nor `kl_scale`, is a function of progress."""
        return not any(callable(value) for value in (*self.values, self.kl_scale))

    @property
    def rows(self) -> int | None:
        """How many samples it speaks of, where it has one preference a sample."""
        given = self.at(0.0)
        tensors = [value for value in (*given.values, given.kl_scale) if isinstance(value, Tensor)]
        return len(tensors[0]) if tensors else None

    def at(self, progress: float) -> "Preference":
        """The constant preference in force at this progress (0 at noise, 1 at data). ValueError outside [0, 1]."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must lie in [0, 1] (0 at noise, 1 at data), received {progress}")
        if self.is_constant:
            return self
        weights = {name: _resolved(f'weight of "{name}"', w, progress) for name, w in self.weights.items()}
        scale = _resolved("kl_scale", self.kl_scale, progress)
        return Preference(weights, scale, allow_negative=self.allow_negative)

    def coefficients(self, progress: float | None = None) -> dict[str, Amount]:
        """`{"base": 1 - lambda, name: lambda w}`, which sum to 1; one-hot is exactly zeros and a one.

        Numbers, or tensors `(n,)` with one preference a sample. ValueError where it changes with progress and
        none is given.
        """
        if not self.is_constant:
            if progress is None:
                raise ValueError("this preference is a function of progress: pass progress, from 0 (noise) to 1 (data)")
            return self.at(progress).coefficients()
        scale: Any = self.kl_scale
        return {BASE: 1.0 - scale} | {name: scale * w for name, w in self.weights.items()}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Preference):
            return NotImplemented
        mine, theirs = ((*p.values, p.kl_scale) for p in (self, other))
        return self.names == other.names and all(map(_same, mine, theirs))

    def __hash__(self) -> int:
        numbers = tuple(value for value in (*self.values, self.kl_scale) if isinstance(value, float))
        return hash((self.names, numbers))

    def require_rows(self, n: int, progress: float) -> None:
        """ValueError where it has, at this progress, one preference a sample, but not for `n` samples."""
        if (rows := self.at(progress).rows) not in (None, n):
            raise ValueError(f"one preference a sample: {n} samples, received {rows} preferences")

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


def _weight(name: str, value: Any, allow_negative: bool) -> Weight:
    weight = _amount(f'weight of "{name}"', value)
    if not callable(weight) and _lowest(weight) < 0 and not allow_negative:
        raise ValueError(f'weight of "{name}" is negative: {value}; use at least 0, or say allow_negative=True')
    return weight


def _scale(value: Any) -> Weight:
    scale = _amount("kl_scale", value)
    if not callable(scale) and _lowest(scale) < 0:
        raise ValueError(f"kl_scale must be at least 0 (0 is the base model), received {value}")
    return scale


def _amount(what: str, value: Any) -> Weight:
    """A finite float, a finite float64 tensor (n,), or the function as it is."""
    if callable(value) and not isinstance(value, Tensor):
        return value
    if isinstance(value, Tensor) and value.ndim == 1 and len(value):
        if value.is_complex() or not bool(value.isfinite().all()):
            raise ValueError(f"{what} must hold finite numbers, received {value.tolist()}")
        return value.detach().to(torch.float64).clone()
    try:
        # float("0.5") would work, but a weight that arrives as text is a parsing error of the caller
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{what} must be a finite number, received {value!r}")
    return number


def _resolved(what: str, value: Weight, progress: float) -> Any:
    if not callable(value) or isinstance(value, Tensor):
        return value
    amount = value(progress)
    if callable(amount) and not isinstance(amount, Tensor):
        raise ValueError(f"{what} must return a number or a tensor (n,) at progress {progress}, received {amount!r}")
    return amount


def _normalised(weights: Mapping[str, Any], values: list[Any]) -> tuple[Amount, ...]:
    """The weights over their sum, which must be 1 up to rounding in every row."""
    total = sum(values)
    if _lowest(-abs(total - 1.0)) < -SUM_TOLERANCE:
        raise ValueError(f"weights must sum to 1, received {_listing(weights)} with sum {_shown(total)}; rescale them")
    return tuple(value / total for value in values)


def _common_length(amounts: Mapping[str, Any]) -> None:
    lengths = {name: len(amount) for name, amount in amounts.items() if isinstance(amount, Tensor)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"one number a sample needs tensors of one length, received {lengths}")


def _lowest(amount: Amount) -> float:
    return float(amount.min()) if isinstance(amount, Tensor) else amount


def _same(left: Weight, right: Weight) -> bool:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return isinstance(left, Tensor) and isinstance(right, Tensor) and torch.equal(left, right)
    return left == right


def _shown(total: Amount) -> str:
    return str(total.tolist()) if isinstance(total, Tensor) else f"{total:.8g}"


def _listing(weights: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in weights.items())


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names) or "none"
