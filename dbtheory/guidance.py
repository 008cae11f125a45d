"""Classifier-free guidance of exact experts, and the density it is said to sample (MATH.md 1 and 9).

Guidance mixes two scores at each noise level: `(1 - s) grad log p_u,t + s grad log p_c,t`. At t = 0 this is that of
`p_u^(1 - s) p_c^s`, but at t > 0 it is not that density's noised score: guided samples do not follow it, however
exact the two scores are, for the reason for which a blend misses its target.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dbtheory.experts import Experts, Points
from dbtheory.grid import GridLaw
from dbtheory.law import Law
from dbtheory.parametrization import Parametrization
from dbtheory.schedule import NoiseSchedule


class GuidedExperts:
    """Experts whose every prediction is `unconditional + s (conditional - unconditional)`, s = `guidance`.

    This is diffusers' convention: s = 1 is the conditional experts, unguided, and 0 the unconditional ones; neither
    evaluates the other. Both sets must be the same experts but for what they are conditioned on.

    Raises:
        ValueError: a guidance that is not finite; experts that differ in names, schedule, parametrisation, shape,
            dtype or device.
    """

    def __init__(self, conditional: Experts, unconditional: Experts, guidance: float | int) -> None:
        if not math.isfinite(guidance):
            raise ValueError(f"guidance must be finite (1 is none, 7.5 is common), received {guidance}")
        for what in ("names", "schedule", "parametrization", "event_shape", "dtype", "device"):
            ours, theirs = getattr(conditional, what), getattr(unconditional, what)
            if ours != theirs:
                raise ValueError(f"conditional and unconditional experts differ in {what}: {ours} and {theirs}")
        self.conditional, self.unconditional, self.guidance = conditional, unconditional, guidance
        self.names: tuple[str, ...] = conditional.names
        self.schedule: NoiseSchedule = conditional.schedule
        self.parametrization: Parametrization = conditional.parametrization
        self.event_shape: tuple[int, ...] = conditional.event_shape
        self.dtype: torch.dtype = conditional.dtype
        self.device: torch.device = conditional.device

    def predict(self, x: Points, t: Tensor | float, names: Sequence[str]) -> Tensor:
        """Every named expert, guided, at every point: `(len(names), n, *event)`."""
        return self._guided(lambda experts: experts.predict(x, t, names))

    def predict_each(self, x: Points, t: Tensor | float, assignment: Int64[Tensor, " n"]) -> Points:
        """One guided expert a point: `assignment (n,)` indexes `names`."""
        return self._guided(lambda experts: experts.predict_each(x, t, assignment))

    def _guided(self, prediction: Callable[[Experts], Tensor]) -> Tensor:
        if self.guidance in (0, 1):
            return prediction(self.conditional if self.guidance else self.unconditional)
        conditional, unconditional = prediction(self.conditional), prediction(self.unconditional)
        return unconditional + self.guidance * (conditional - unconditional)


def guided_target(
    conditional: Law,
    unconditional: Law,
    guidance: float | int,
    low: Sequence[float],
    high: Sequence[float],
    counts: Sequence[int],
) -> GridLaw:
    """What guided experts formally aim at, `p_u^(1 - s) p_c^s` normalised, on a grid in 1-D or 2-D.

    `conditional` p_c and `unconditional` p_u are the laws of the two experts at t = 0. Aligned to one reward, both
    carry the factor `e^(r/alpha)`, and so does the product. Where it has no finite mass the grid's
    `discretisation_error` shows it, as mass on the window's rim. ValueError as `GridLaw.from_density`.
    """

    def log_density(x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        return (1 - guidance) * unconditional.log_prob(x) + guidance * conditional.log_prob(x)

    return GridLaw.from_density(log_density, low, high, counts)
