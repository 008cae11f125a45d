"""Small runs of the trainer: a tiny policy, a reward that needs no model, settings for seconds of work."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from scale.rewards import Scorer
from scale.train.denoiser import ATTENTION, CONVOLUTIONS, DenoiserPolicy
from scale.train.settings import Dpok
from tests.scale import tiny

PROMPTS = ["a red circle", "a blue star", "a green heart and a red ring"]
TARGETS = ATTENTION + CONVOLUTIONS


class Brightness(Scorer):
    """The mean of an image's pixels."""

    name = "brightness"

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))


class Changing(Brightness):
    """Brightness until `change(round, scores)` says otherwise; a round calls `score` once a step and once more."""

    def __init__(self, steps: int, change: Callable[[int, Tensor], Tensor]) -> None:
        self.calls, self.a_round, self.change = 0, steps + 1, change

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """What `_score` gives is checked after the change."""
        self.calls += 1
        return super().score(images, prompts)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.change((self.calls - 1) // self.a_round, super()._score(images, prompts))


def settings(**options: Any) -> Dpok:
    """Two prompts x four samples, four steps, three rounds of two updates, in float32."""
    small = {
        "rounds": 3, "prompts_per_round": 2, "samples_per_prompt": 4, "steps": 4, "updates": 2, "batch": 16,
        "microbatch": 16, "value_updates": 3, "precision": "no", "alpha": 1e-4, "learning_rate": 5e-3,
    }  # fmt: skip
    return Dpok(**{**small, **options})


def policy(options: Dpok, make: Callable[[], Any] = tiny.sd) -> DenoiserPolicy:
    """A tiny pipeline with a fresh adapter, as the settings ask."""
    made = DenoiserPolicy(make(), options.steps, options.guidance, size=options.size)
    made.add_adapter(options.rank, options.targets, options.seed)
    return made


@torch.no_grad()
def stir(trained: DenoiserPolicy, seed: int = 0, scale: float = 0.3) -> DenoiserPolicy:
    """The same policy, both factors of its adapter drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained.trainable().values():
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return trained


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    """One a row."""
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers in one vector, detached."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def weights(trained: DenoiserPolicy) -> Tensor:
    """The adapter as one vector."""
    return flat(trained.trainable().values())
