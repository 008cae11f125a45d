"""The blenders: which experts are evaluated, and how their predictions become one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dbtheory.assignment import independent_choice, rotation_choice
from dbtheory.experts import Experts, Points
from dbtheory.preference import Amount, Preference


@dataclass(frozen=True, eq=False)
class Step:
    """Where generation stands: step `index` of `count`, from time `t` down to `t_next` (0 = data, 1 = noise).

    `phase (n,)` are uniforms on [0, 1), drawn once a trajectory: they travel with a sample through chunking
    and resampling, and all of a blender's random choices derive from them.
    """

    index: int
    count: int
    t: Tensor | float
    t_next: Tensor | float
    phase: Float[Tensor, " n"]

    @property
    def progress(self) -> float:
        """0 at the first evaluation (noise), 1 at the last (data)."""
        return self.index / (self.count - 1) if self.count > 1 else 0.0


@runtime_checkable
class Blender(Protocol):
    """Makes one prediction, shaped like `x (n, ...)`, in the experts' parametrisation."""

    def __call__(self, experts: Experts, x: Points, t: Tensor | float, step: Step) -> Points: ...


@runtime_checkable
class AffineBlender(Blender, Protocol):
    """A blender whose prediction is an affine combination of the experts': what Feynman-Kac can correct."""

    def coefficients(self, step: Step) -> Mapping[str, Amount]:
        """By expert, summing to 1: numbers, or tensors `(n,)` with one preference a sample."""
        ...


@dataclass(frozen=True)
class MeanBlend:
    """DB-MPA, DB-KLA and both at once: `sum_i c_i prediction_i` with the preference's coefficients.

    Evaluates only experts with a nonzero coefficient; a one-hot preference is that expert's prediction, bit
    for bit. Raises ValueError if the experts are not those of the preference, or the samples not as many.
    """

    preference: Preference

    def coefficients(self, step: Step) -> Mapping[str, Amount]:
        """The preference's own: `{"base": 1 - lambda, name: lambda w}`."""
        return self.preference.coefficients(step.progress)

    def __call__(self, experts: Experts, x: Points, t: Tensor | float, step: Step) -> Points:
        self.preference.validate(experts.names)
        return weighted_sum(experts, x, t, self.coefficients(step))


@dataclass(frozen=True)
class SampledBlend:
    """DB-MPA-LS: one evaluation a step, of an expert drawn for each sample with probability `c_i`.

    The draws are per sample: one shared by a batch would correlate it. `order="low-discrepancy"` also keeps
    every prefix of a trajectory's steps in proportion (MATH.md 6); "iid" draws the steps independently.

    Raises:
        ValueError: a negative coefficient (`kl_scale > 1`), which is no probability; an unknown order; at the
            call, experts that are not those of the preference.
    """

    preference: Preference
    order: str = "low-discrepancy"

    def __post_init__(self) -> None:
        negative = {name: c for name, c in self.preference.coefficients().items() if c < 0}
        if negative:
            listing = ", ".join(f"{name}={c:.6g}" for name, c in negative.items())
            raise ValueError(
                f"sampling needs coefficients that are probabilities, received {listing} "
                f"(kl_scale {self.preference.kl_scale:.6g}); use MeanBlend, or kl_scale <= 1 and weights >= 0"
            )
        if self.order not in ("low-discrepancy", "iid"):
            raise ValueError(f'order must be "low-discrepancy" or "iid", received {self.order!r}')

    def __call__(self, experts: Experts, x: Points, t: Tensor | float, step: Step) -> Points:
        self.preference.validate(experts.names)
        coefficients = self.preference.coefficients()
        active = [name for name in experts.names if coefficients[name] != 0]
        if len(active) == 1:
            return experts.predict(x, t, active)[0]
        if step.phase.shape != x.shape[:1]:
            raise ValueError(f"one phase a sample: {x.shape[0]} samples, phase of shape {tuple(step.phase.shape)}")
        choice = self.choose([coefficients[name] for name in active], step)
        index = torch.tensor([experts.names.index(name) for name in active], device=choice.device)
        return experts.predict_each(x, t, index[choice].to(x.device))

    def choose(self, probabilities: Sequence[float], step: Step) -> Int64[Tensor, " n"]:
        """One index into `probabilities` for each sample, at this step."""
        draw = rotation_choice if self.order == "low-discrepancy" else independent_choice
        return draw(probabilities, step.index, step.phase)


def weighted_sum(experts: Experts, x: Points, t: Tensor | float, coefficients: Mapping[str, Amount]) -> Points:
    """`sum_i coefficients[i] prediction_i`; experts whose coefficient is zero everywhere are not evaluated."""
    active = active_names(experts, coefficients)
    return combine(experts.predict(x, t, active), [coefficients[name] for name in active])


def active_names(experts: Experts, coefficients: Mapping[str, Amount]) -> list[str]:
    """The experts whose coefficient is not zero for every sample, in the experts' order."""
    return [name for name in experts.names if name in coefficients and _is_used(coefficients[name])]


def combine(predictions: Float[Tensor, "m n *event"], coefficients: Sequence[Amount]) -> Points:
    """`sum_i coefficients[i] predictions[i]`, coefficients being numbers or one number a sample `(n,)`."""
    if len(predictions) == 1:
        # its coefficient is 1 up to rounding: multiplying could only lose bits
        return predictions[0]
    first, *rest = (_beside(c, predictions[0]) for c in coefficients)
    blended = first * predictions[0]
    for c, prediction in zip(rest, predictions[1:], strict=True):
        # one pass over memory, not two
        blended = blended.addcmul(c, prediction) if isinstance(c, Tensor) else blended.add(prediction, alpha=c)
    return blended


def _is_used(coefficient: Amount) -> bool:
    return bool(coefficient.any()) if isinstance(coefficient, Tensor) else coefficient != 0


def _beside(coefficient: Amount, x: Tensor) -> Tensor | float:
    """A number as it is; one number a sample in the shape, dtype and device that multiply `x` (n, ...)."""
    if not isinstance(coefficient, Tensor):
        return coefficient
    if len(coefficient) != len(x):
        raise ValueError(f"one preference a sample: {len(x)} samples, received {len(coefficient)} preferences")
    return coefficient.to(x).reshape(-1, *[1] * (x.ndim - 1))
