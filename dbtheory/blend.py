"""The blenders: which experts are evaluated, and how their predictions become one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dbtheory.assignment import Probabilities, changing_rotation_choice, independent_choice, rotation_choice
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


@runtime_checkable
class NoisyBlender(Blender, Protocol):
    """A blender that shapes the noise of its steps as well as their mean."""

    def require_method(self, method: str) -> None:
        """ValueError where the noise does not belong to this method of the sampler."""
        ...

    def noise(self, z: Points, own_variance: Tensor | float, x: Points, step: Step) -> Points:
        """The noise of the step from `x`, by standard normal `z`, where the sampler's own has `own_variance`."""
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
        self.preference.require_rows(len(x), step.progress)
        return weighted_sum(experts, x, t, self.coefficients(step))


@dataclass(frozen=True)
class SampledBlend:
    """DB-MPA-LS: one evaluation a step, of an expert drawn for each sample with probability `c_i`.

    `order="low-discrepancy"` keeps every prefix of a trajectory's steps in proportion (MATH.md 6); "iid" draws the
    steps independently. `share="batch"` draws once for all samples, by the phase of the first: one adapter is
    active at a time, as practitioners run it. Each sample keeps its law, but depends on the batch it is made in, and
    with "iid" the batch is correlated (ring of six, 25 steps: the mean of 64 samples varies as that of 4 would); with
    "low-discrepancy" hardly, since all samples stay near DB-MPA's own paths (proofs_check/low_discrepancy.py).

    Raises:
        ValueError: a negative coefficient (`kl_scale > 1`), which is no probability (of a preference that changes
            with progress: at the call); an unknown order or share; at the call, experts that are not those of the
            preference, or phases or preferences that are not one a sample.
    """

    preference: Preference
    order: str = "low-discrepancy"
    share: str = "sample"

    def __post_init__(self) -> None:
        if self.order not in ("low-discrepancy", "iid"):
            raise ValueError(f'order must be "low-discrepancy" or "iid", received {self.order!r}')
        if self.share not in ("sample", "batch"):
            raise ValueError(f'share must be "sample" or "batch", received {self.share!r}')
        if self.preference.is_constant:
            _law(self.preference.coefficients())

    def __call__(self, experts: Experts, x: Points, t: Tensor | float, step: Step) -> Points:
        assignment = self.assign(experts, len(x), step)
        if assignment is None:
            return experts.predict(x, t, active_names(experts, self.preference.coefficients(step.progress)))[0]
        return experts.predict_each(x, t, assignment.to(x.device))

    def assign(self, experts: Experts, n: int, step: Step) -> Int64[Tensor, " n"] | None:
        """Which of the experts each of `n` samples follows at this step; None where only one has a coefficient."""
        self.preference.validate(experts.names)
        self.preference.require_rows(n, step.progress)
        names, probabilities = self._probabilities(experts, step)
        if len(names) == 1:
            return None
        if step.phase.shape != (n,):
            raise ValueError(f"one phase a sample: {n} samples, phase of shape {tuple(step.phase.shape)}")
        index = torch.tensor([experts.names.index(name) for name in names], device=step.phase.device)
        return index[self.choose(probabilities, step)]

    def choose(self, probabilities: Probabilities | Float[Tensor, "steps rows m"], step: Step) -> Int64[Tensor, " n"]:
        """One index into `probabilities` for each sample, at this step.

        They are the same at every step, as numbers, (m,) or (n, m), or those of all steps so far: (index + 1, rows, m).
        """
        phase = step.phase[:1].expand_as(step.phase) if self.share == "batch" else step.phase
        if isinstance(probabilities, Tensor) and probabilities.ndim == 3:
            if self.order == "iid":
                return independent_choice(probabilities[-1], step.index, phase)
            return changing_rotation_choice(probabilities, phase)
        draw = rotation_choice if self.order == "low-discrepancy" else independent_choice
        return draw(probabilities, step.index, phase)

    def _probabilities(self, experts: Experts, step: Step) -> tuple[list[str], Tensor]:
        """The experts drawn from, and what `choose` takes: (rows, m), or (steps, rows, m) where they change."""
        if self.preference.is_constant:
            coefficients = self.preference.coefficients()
            names = active_names(experts, coefficients)
            return names, _law({name: coefficients[name] for name in names})
        # Every expert keeps its place in the order, also while it has no weight; draws are replayed, not remembered.
        first = step.index if self.order == "iid" else 0
        laws = [self.preference.coefficients(replace(step, index=k).progress) for k in range(first, step.index + 1)]
        tensors = [_law({name: law[name] for name in experts.names}) for law in laws]
        return list(experts.names), torch.stack(torch.broadcast_tensors(*tensors))


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


def _law(coefficients: Mapping[str, Amount]) -> Float[Tensor, "rows m"]:
    """Coefficients as probabilities, one row a sample or one for all; ValueError where one is negative."""
    columns = [torch.as_tensor(c, dtype=torch.float64).reshape(-1) for c in coefficients.values()]
    lowest = {name: float(c.min()) for name, c in zip(coefficients, columns, strict=True)}
    negative = ", ".join(f"{name}={c:.6g}" for name, c in lowest.items() if c < 0)
    if negative:
        raise ValueError(
            f"sampling needs coefficients that are probabilities, received {negative}; "
            "use MeanBlend, or kl_scale <= 1 and weights >= 0"
        )
    return torch.stack(torch.broadcast_tensors(*columns), -1)


def _is_used(coefficient: Amount) -> bool:
    return bool(coefficient.any()) if isinstance(coefficient, Tensor) else coefficient != 0


def _beside(coefficient: Amount, x: Tensor) -> Tensor | float:
    """A number as it is; one number a sample in the shape, dtype and device that multiply `x` (n, ...)."""
    if not isinstance(coefficient, Tensor):
        return coefficient
    if len(coefficient) != len(x):
        raise ValueError(f"one preference a sample: {len(x)} samples, received {len(coefficient)} preferences")
    return coefficient.to(x).reshape(-1, *[1] * (x.ndim - 1))
