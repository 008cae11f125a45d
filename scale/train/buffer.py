"""The newest trajectories, and batches of their transitions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from scale.train.policy import Condition, State, rows_of


@dataclass(frozen=True)
class Transitions:
    """Single steps: what one update sees."""

    x: State
    x_next: State
    k: Int64[Tensor, " n"]
    advantage: Float[Tensor, " n"]
    log_probability: Float[Tensor, " n"]
    condition: Condition


@dataclass(frozen=True)
class Trajectories:
    """Whole trajectories with what is known of them; the newest last."""

    states: Float[Tensor, "states n *event"]
    guesses: Float[Tensor, "steps n *event"]
    hints: Float[Tensor, "steps n"]
    log_probabilities: Float[Tensor, "steps n"]
    advantages: Float[Tensor, "steps n"]
    returns: Float[Tensor, " n"]
    features: Float[Tensor, "n width"]
    condition: Condition

    def __len__(self) -> int:
        return len(self.returns)

    @property
    def steps(self) -> int:
        return len(self.hints)

    @staticmethod
    def joined(parts: Sequence["Trajectories"]) -> "Trajectories":
        """All of them, in order."""
        merged: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts], axis) for name, axis in _AXES.items()
        }
        condition = {name: torch.cat([part.condition[name] for part in parts]) for name in parts[0].condition}
        return Trajectories(**merged, condition=condition)

    def followed_by(self, newer: "Trajectories", capacity: int) -> "Trajectories":
        """These and newer ones, the newest `capacity` of them."""
        return Trajectories.joined((self, newer)).mapped(lambda value: value[-capacity:].clone())

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Trajectories":
        """Every tensor changed; `change` sees a trajectory a row."""
        fields: dict[str, Any] = {
            name: change(getattr(self, name).movedim(axis, 0)).movedim(0, axis) for name, axis in _AXES.items()
        }
        return Trajectories(**fields, condition={name: change(value) for name, value in self.condition.items()})

    def with_advantages(self, advantages: Float[Tensor, "steps n"]) -> "Trajectories":
        """The same with other advantages."""
        return replace(self, advantages=advantages)

    def transitions(self, rows: Int64[Tensor, " rows"]) -> Transitions:
        """Transitions by number: step k of trajectory i is `k * len(self) + i`."""
        k, i = rows // len(self), rows % len(self)
        states, logs = self.states, self.log_probabilities
        device_k = k.to(states.device)
        return Transitions(
            states[k, i], states[k + 1, i], device_k, self.advantages[k, i], logs[k, i], rows_of(self.condition, i)
        )

    def value_data(self) -> dict[str, Tensor]:
        """Every transition as a row of what the value function learns from."""
        steps, n = self.steps, len(self)
        k = torch.arange(steps, device=self.returns.device).repeat_interleave(n)
        texts, returns = self.features.repeat(steps, 1), self.returns.repeat(steps)
        return {
            "guess": self.guesses.flatten(0, 1), "text": texts, "k": k, "hint": self.hints.flatten(), "returns": returns
        }  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain tensors, as a checkpoint stores them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


_AXES = {
    "states": 1, "guesses": 1, "hints": 1, "log_probabilities": 1, "advantages": 1, "returns": 0, "features": 0
}  # fmt: skip
