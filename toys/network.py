"""A small score network for toys, and its training by denoising score matching, many networks at once."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from dbtheory.schedule import NoiseSchedule, expand_like

State = dict[str, Tensor]  # a network's weights by name
WAVES = 4
LOWEST_T = 1e-4  # below it the noise is lost in float32


class ScoreNetwork(nn.Module):
    """`eps(x, t)`: an MLP on the point and on waves of t; x (n, d), t (n,)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        sizes = [dim + 2 * WAVES + 1, width, width, width]
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, dim))

    def forward(self, x: Float[Tensor, "n d"], t: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
        # the square root spreads the times near the data, where the score changes fastest
        root = t.sqrt().unsqueeze(-1)
        angles = math.pi * root * torch.arange(1, WAVES + 1, device=x.device)
        return self.layers(torch.cat([x, root, angles.sin(), angles.cos()], dim=-1))


@dataclass(frozen=True)
class Training:
    """How the networks are trained: Adam with a cosine decay to zero; the experts start from the base."""

    width: int = 64
    base_steps: int = 3000
    expert_steps: int = 1000
    batch: int = 512
    rate: float = 5e-3
    expert_rate: float = 1e-3
    seed: int = 0


def initial_state(dim: int, training: Training) -> State:
    """Fresh weights that depend on the training's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        network = ScoreNetwork(dim, training.width)
    return {name: weight.detach() for name, weight in network.named_parameters()}


def evaluate(state: Mapping[str, Tensor], x: Float[Tensor, "n d"], t: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """The network of these weights, in their dtype, at points x (n, d) and times t (n,)."""
    return functional_call(_skeleton_of(state), dict(state), (x, t))


def fit(
    starts: Sequence[State],
    draws: Float[Tensor, "k _ d"],
    schedule: NoiseSchedule,
    steps: int,
    batch: int,
    rate: float,
    generator: torch.Generator,
    tick: Callable[[], object] | None = None,
) -> list[State]:
    """Each of k starts trained on its own draws of `x_0` by `min E |eps(x_t, t) - z|^2`, all of them at once.

    All networks see the same times, noise and rows of draws: what tells them apart is their data alone.
    """
    stacked = {name: torch.stack([start[name].float() for start in starts]).requires_grad_() for name in starts[0]}
    network = _skeleton_of(starts[0])
    predict = vmap(lambda state, x, t: functional_call(network, state, (x, t)), in_dims=(0, 0, None))
    optimizer = torch.optim.Adam(stacked.values(), lr=rate, fused=False)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        t = _times(batch, schedule, generator)
        x0 = draws[:, torch.randint(draws.shape[1], (batch,), generator=generator)].float()
        noise = torch.randn(x0.shape[1:], generator=generator)
        noised = expand_like(schedule.alpha(t), noise) * x0 + expand_like(schedule.sigma(t), noise) * noise
        # summed over networks: each has its own weights, so each follows its own gradient
        loss = (predict(stacked, noised, t.float()) - noise).square().mean((1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if tick is not None:
            tick()
    return [{name: weight.detach()[k].clone() for name, weight in stacked.items()} for k in range(len(starts))]


def _times(batch: int, schedule: NoiseSchedule, generator: torch.Generator) -> Float[Tensor, " n"]:
    """Stratified, and crowded near the data as the samplers' grids are."""
    strata = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return schedule.t_start * (strata.double() ** 2).clamp_min(LOWEST_T)


def _skeleton_of(state: Mapping[str, Tensor]) -> ScoreNetwork:
    return _skeleton(dim=len(state["layers.6.weight"]), width=len(state["layers.0.weight"]))


@cache
def _skeleton(dim: int, width: int) -> ScoreNetwork:
    """A network of this shape without weights of its own."""
    with torch.device("meta"):
        return ScoreNetwork(dim, width)
