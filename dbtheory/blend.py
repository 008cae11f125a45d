"""The blenders: which experts are evaluated, and how their predictions become one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dbtheory.experts import Experts, Points
from dbtheory.preference import Preference
from dbtheory.random import uniform


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


@runtime_checkable
class Blender(Protocol):
    """Makes one prediction, shaped like `x (n, ...)`, in the experts' parametrisation."""

    def __call__(self, experts: Experts, x: Points, t: Tensor | float, step: Step) -> Points: ...


@dataclass(frozen=True)
class MeanBlend:
    """DB-MPA, DB-KLA and both at once: `sum_i c_i prediction_i` with the preference's coefficients.

    Evaluates only experts with a nonzero coefficient; a one-hot preference is that expert's prediction, bit
    for bit. Raises ValueError if the experts are not those of the preference.
    """

    preference: Preference

    def __call__(self, experts: Experts, x: Points, t: Tensor | float, step: Step) -> Points:
        self.preference.validate(experts.names)
        return _weighted_sum(experts, x, t, self.preference.coefficients())


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


@dataclass(frozen=True)
class PrecisionBlend:
    """MSDDA for isotropic kernels `N(mu_i, s_i^2 I)`: the step-wise optimum of MATH.md 7.

    Precisions add: `L = sum_i c_i / s_i^2`, so it is DB-MPA with coefficients `rho_i = c_i / (s_i^2 L)` and
    step variance `1 / L`. `variances` maps "base" and every expert of the preference to `s_i^2`, in units of
    the sampler's own step variance. All equal: DB-MPA.

    Raises:
        ValueError: a variance that is missing, unknown, or not positive and finite; `L` not positive.
    """

    preference: Preference
    variances: Mapping[str, Tensor | float | int]

    def __post_init__(self) -> None:
        expected = self.preference.coefficients()
        if set(self.variances) != set(expected):
            raise ValueError(f"variances are needed for {sorted(expected)}, received {sorted(self.variances)}")
        for name, variance in self.variances.items():
            if not (0 < float(variance) < math.inf):
                raise ValueError(f'variance of "{name}" must be positive and finite, received {variance}')
        if self._precision() <= 0:
            raise ValueError(
                f"the blended precision sum c_i / s_i^2 is {self._precision():.6g}, not positive: no such "
                f"Gaussian step exists; lower kl_scale ({self.preference.kl_scale:.6g})"
            )

    @property
    def noise_variance(self) -> float:
        """`1 / L`: the blended step's variance, in units of the sampler's own."""
        return 1.0 / self._precision()

    def coefficients(self) -> dict[str, float]:
        """`rho_i`, which sum to 1."""
        total = self._precision()
        return {name: c / float(self.variances[name]) / total for name, c in self.preference.coefficients().items()}

    def __call__(self, experts: Experts, x: Points, t: Tensor | float, step: Step) -> Points:
        self.preference.validate(experts.names)
        return _weighted_sum(experts, x, t, self.coefficients())

    def _precision(self) -> float:
        return sum(c / float(self.variances[name]) for name, c in self.preference.coefficients().items())


def _weighted_sum(experts: Experts, x: Tensor, t: Tensor | float, coefficients: Mapping[str, float]) -> Tensor:
    active = [name for name in experts.names if coefficients[name] != 0]
    predictions = experts.predict(x, t, active)
    if len(active) == 1:
        # its coefficient is 1 up to rounding: multiplying could only lose bits
        return predictions[0]
    blended = coefficients[active[0]] * predictions[0]
    for name, prediction in zip(active[1:], predictions[1:], strict=True):
        blended = blended.add(prediction, alpha=coefficients[name])
    return blended
