"""DB-MPA near the cost of one model: exact while the image takes shape, then one expert a step beside what was seen."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.blend import SampledBlend, Step, active_names, combine
from dbtheory.experts import Experts, Points
from dbtheory.preference import Preference


@dataclass
class Held:
    """What the experts predicted at one trajectory's last exact step, by the evaluations of a step.

    Other phases are other images, or as many rows more or less: what was held of them is of no use.
    """

    phase: Tensor = field(default_factory=lambda: torch.empty(0))
    steps: list[int] = field(default_factory=list)
    predictions: dict[int, Tensor] = field(default_factory=dict)

    def begin(self, step: Step) -> int:
        """Which of the step's evaluations this is, two under true guidance; a new trajectory forgets the last."""
        if (self.steps and step.index < self.steps[-1]) or not torch.equal(self.phase, step.phase):
            self.steps, self.predictions = [], {}
        self.phase = step.phase
        self.steps.append(step.index)
        return self.steps.count(step.index) - 1


@dataclass(frozen=True, eq=False)
class HeldBlend:
    """All experts in the first `exact` share of a trajectory's steps; after it one a step, drawn as by DB-MPA-LS.

    The drawn expert's prediction `e_i` is moved by `sum_j c_j e_j - e_i` of the last exact step: a control variate, so
    the mean over draws is DB-MPA's prediction whatever its age. In all `1 + (m - 1) exact` evaluations a step.

    Raises:
        ValueError: an `exact` outside (0, 1]; what `SampledBlend` refuses.
    """

    preference: Preference
    exact: float = 0.2
    held: Held = field(default_factory=Held, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.exact <= 1:
            raise ValueError(f"exact is the share of steps with every expert, in (0, 1], received {self.exact}")
        _ = self.drawn  # refuses coefficients that are no probabilities

    @cached_property
    def drawn(self) -> SampledBlend:
        """Which expert is evaluated after the exact steps."""
        return SampledBlend(self.preference)

    def __call__(self, experts: Experts, x: Points, t: Tensor | float, step: Step) -> Points:
        assignment = self.drawn.assign(experts, len(x), step)
        if assignment is None:
            return self.drawn(experts, x, t, step)
        call = self.held.begin(step)
        coefficients = self.preference.coefficients(step.progress)
        c = [coefficients[name] for name in experts.names]
        if self._is_exact(step) or call not in self.held.predictions:
            self.held.predictions[call] = self._evaluate(experts, x, t, step)
            return combine(self.held.predictions[call], c)
        held, assignment = self.held.predictions[call], assignment.to(x.device)
        apart = combine(held, c) - held[assignment, torch.arange(len(x), device=x.device)]
        return experts.predict_each(x, t, assignment) + apart

    def _is_exact(self, step: Step) -> bool:
        first = self.held.steps[0]
        return step.index - first < self.exact * (step.count - first)

    def _evaluate(self, experts: Experts, x: Points, t: Tensor | float, step: Step) -> Float[Tensor, "m n *event"]:
        """Every expert's prediction; zeros for those that this preference never draws."""
        constant = self.preference.is_constant
        names = active_names(experts, self.preference.coefficients(step.progress)) if constant else list(experts.names)
        predictions = experts.predict(x, t, names)
        if len(names) == len(experts.names):
            return predictions
        every = predictions.new_zeros(len(experts.names), *predictions.shape[1:])
        every[[experts.names.index(name) for name in names]] = predictions
        return every
