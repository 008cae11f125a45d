"""The value function: what reward a state promises, given the text and the step."""

from collections.abc import Mapping
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from scale.train.policy import State


class Value(nn.Module):
    """`V(state, text, step) -> (n,)`.

    A small convolutional network reads the state's guess of the data, a linear layer the text, an embedding the step.
    `hint (n,)` is the reward of that guess where the trainer looks ahead, else 0: it enters with one learned gain a
    step, at first 1, so that the untrained function is the hint itself.
    """

    def __init__(self, event_shape: tuple[int, ...], features: int, steps: int, width: int = 64) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(steps)), nn.Parameter(torch.zeros(steps))
        self.body = _body(event_shape, width)
        self.text, self.step = nn.Linear(features, width), nn.Embedding(steps, width)
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(
        self, guess: State, text: Float[Tensor, "n features"], k: Int64[Tensor, " n"],
        hint: Float[Tensor, " n"],
    ) -> Float[Tensor, " n"]:  # fmt: skip
        mixed = self.body(guess) + self.text(text) + self.step(k)
        return self.gain[k] * hint + self.bias[k] + self.head(mixed).squeeze(1)


def _body(event_shape: tuple[int, ...], width: int) -> nn.Module:
    """Images are halved down to 4 x 4; anything else is a vector."""
    if len(event_shape) != 3 or min(event_shape[1:]) < 4:
        return nn.Sequential(nn.Flatten(), nn.Linear(prod(event_shape), width))
    layers: list[nn.Module] = []
    channels, size = event_shape[0], min(event_shape[1:])
    while size > 4:
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
        channels, size = width, (size + 1) // 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(channels * 16, width))


def fit_value(
    value: Value, optimizer: torch.optim.Optimizer, data: Mapping[str, Tensor], updates: int, batch: int,
    generator: torch.Generator,
) -> float:  # fmt: skip
    """Least squares on the returns of stored transitions; the mean squared error of the last batch, before its update.

    `data` holds `guess`, `text`, `k`, `hint` and `returns`, a transition a row; batches are drawn by `generator`.
    """
    loss = torch.zeros(())
    for _ in range(updates):
        rows = torch.randint(len(data["k"]), (min(batch, len(data["k"])),), generator=generator)
        guess, text, k, hint, returns = (data[name][rows] for name in ("guess", "text", "k", "hint", "returns"))
        loss = F.mse_loss(value(guess, text, k, hint), returns)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return float(loss.detach())
