"""Rewarded soup: one model whose adapters are averaged, at the cost of one evaluation a step (paper section 5)."""

from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.blend import Step
from dbtheory.experts import Experts, Points
from dbtheory.preference import BASE, Preference

AVERAGES = ("deltas", "factors")


@runtime_checkable
class SoupExperts(Protocol):
    """Experts whose parameters can be averaged, not their predictions alone."""

    def predict_soup(
        self, x: Points, t: Tensor | float, coefficients: Float[Tensor, "k m"], average: str = "deltas"
    ) -> Points: ...


@dataclass(frozen=True)
class SoupBlend:
    """One evaluation of the model with averaged adapters.

    `average="deltas"` is `W + lambda sum_i w_i s_i B_i A_i`, what a soup means; to first order in the deltas it agrees
    with DB-MPA. `average="factors"` is `W + lambda (sum_i w_i s_i B_i)(sum_i w_i A_i)`, what averaging the adapters'
    files gives, as the reference implementation does: at w = 1/2 it keeps a quarter of each delta, plus cross terms.
    A one-hot preference at lambda = 1 (or lambda = 0) is that expert alone, bit for bit.

    Raises:
        ValueError: an unknown average; at the call, experts that cannot be averaged or are not the preference's.
    """

    preference: Preference
    average: str = "deltas"

    def __post_init__(self) -> None:
        if self.average not in AVERAGES:
            raise ValueError(f"average must be one of {AVERAGES}, received {self.average!r}")

    def __call__(self, experts: Experts, x: Points, t: Tensor | float, step: Step) -> Points:
        if not isinstance(experts, SoupExperts):
            raise ValueError(f"a soup averages adapters, which {type(experts).__name__} do not have; use LoraExperts")
        self.preference.validate(experts.names)
        self.preference.require_rows(len(x), step.progress)
        coefficients = self.preference.coefficients(step.progress)
        alone = next((name for name, c in coefficients.items() if not isinstance(c, Tensor) and c == 1), None)
        if alone is not None and all(c is coefficients[alone] or _is_zero(c) for c in coefficients.values()):
            return cast(Experts, experts).predict(x, t, [alone])[0]
        columns = [
            torch.as_tensor(coefficients[n], dtype=torch.float32).reshape(-1) for n in experts.names if n != BASE
        ]
        return experts.predict_soup(x, t, torch.stack(torch.broadcast_tensors(*columns), -1), self.average)


def _is_zero(c: Tensor | float) -> bool:
    return not isinstance(c, Tensor) and c == 0
