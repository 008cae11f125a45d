"""What a trainer sees of a model: Gaussian steps from noise to data, whose means can be learned."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

State = Float[Tensor, "n *event"]
Condition = Mapping[str, Tensor]
"""What a denoiser is told besides state and step: tensors of n rows, by name."""


@dataclass(frozen=True)
class Rollout:
    """Trajectories from noise to data: `states[k]` is where step k begins, `states[-1]` is data.

    `log_probabilities[k]` are those of step k under the policy that made it, and `guesses[k]` is the data that the
    model expected there (`E[x_0 | x_t]`).
    """

    prompts: list[str]
    condition: Condition
    states: Float[Tensor, "states n *event"]
    guesses: Float[Tensor, "steps n *event"]
    log_probabilities: Float[Tensor, "steps n"]
    images: Tensor


@runtime_checkable
class Policy(Protocol):
    """Steps `k = 0 .. steps - 1`, from noise to data, each `N(mean, std^2 I)` with a mean that can be learned."""

    @property
    def steps(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def trainable(self) -> Mapping[str, torch.nn.Parameter]:
        """What is learned, by name."""
        ...

    def rollout(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> Rollout:
        """One trajectory a prompt; a row's noise is its own generator's, whatever else is in the batch."""
        ...

    def decode(self, data: State) -> Tensor:
        """Data as the images that a reward sees."""
        ...

    def moments(self, x: State, k: Int64[Tensor, " n"], condition: Condition) -> tuple[State, Tensor]:
        """Mean, and standard deviation (n, 1, ...), of steps `k` from states `x`."""
        ...

    def base(self) -> AbstractContextManager[None]:
        """Within it `moments` are those of the base model."""
        ...

    def features(self, condition: Condition) -> Float[Tensor, "n width"]:
        """The condition as one vector a row, for the value function."""
        ...


@runtime_checkable
class Reward(Protocol):
    """What a trainer asks of a reward: every `scale.rewards.Scorer` is one."""

    name: str

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images and their prompts -> scores (n,)."""
        ...


def log_probability(x_next: State, mean: State, std: Tensor) -> Float[Tensor, " n"]:
    """Log-density of a Gaussian step per dimension (their mean, as in DPOK's code), constants dropped."""
    return -((x_next - mean) / std).square().flatten(1).mean(1) / 2 - std.flatten(1).log().squeeze(1)


def kl_divergence(mean: State, base_mean: State, std: Tensor) -> Float[Tensor, " n"]:
    """KL of a step from the base model's step of the same variance, per dimension, in nats."""
    return ((mean - base_mean) / std).square().flatten(1).mean(1) / 2


def rows_of(condition: Condition, rows: Tensor | slice) -> dict[str, Tensor]:
    """Some rows of a condition."""
    return {name: value[rows] for name, value in condition.items()}


@torch.no_grad()
def step_kls(policy: Policy, rollout: Rollout) -> Float[Tensor, "steps n"]:
    """KL of every step from the base model's at the states that a rollout went through, in nats.

    Summed over steps, in the mean over the policy's own rollouts, it is the KL of their laws of trajectories (paper
    eq. 4), which bounds that of the images.
    """
    kls = []
    for step, x in enumerate(rollout.states[:-1]):
        k = torch.full((len(x),), step, device=policy.device)
        mean, std = policy.moments(x, k, rollout.condition)
        with policy.base():
            base_mean, _ = policy.moments(x, k, rollout.condition)
        kls.append(kl_divergence(mean, base_mean, std) * x[0].numel())
    return torch.stack(kls)
