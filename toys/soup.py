"""Rewarded soup on a toy: experts fine-tuned from one network, and their weights averaged (Rame et al. 2023).

The exact experts have no weights to average. Here a small network is trained on the prior, one copy of it is
fine-tuned on each reward's target, and the soup of the copies is judged beside the blend of the same copies:
what both share is the networks' own error.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dbtheory.law import Law
from dbtheory.parametrization import Parametrization
from dbtheory.preference import BASE, Amount
from dbtheory.schedule import NoiseSchedule
from toys.network import LOWEST_T, State, Training, evaluate, fit, initial_state

POOL = 50_000  # draws of each target that its network is trained on
SOUP = "soup"


class NetworkExperts:
    """Score networks as `Experts`: noise predictions in float64.

    `states` are the weights by name, the first of them "base". Times below 1e-4 are taken as 1e-4, the lowest that
    networks are trained on. ValueError where the first is another; at a call, for an unknown name or an assignment
    out of range.
    """

    def __init__(self, states: Mapping[str, State], schedule: NoiseSchedule) -> None:
        if next(iter(states), None) != BASE:
            raise ValueError(f'states need "{BASE}" first, received {list(states)}')
        self.states: dict[str, State] = {
            name: {layer: weight.double() for layer, weight in state.items()} for name, state in states.items()
        }
        self.names: tuple[str, ...] = tuple(states)
        self.schedule: NoiseSchedule = schedule
        self.parametrization: Parametrization = "eps"
        self.event_shape: tuple[int, ...] = tuple(self.states[BASE]["layers.6.bias"].shape)
        self.dtype: torch.dtype = torch.float64
        self.device: torch.device = self.states[BASE]["layers.6.bias"].device

    def predict(self, x: Float[Tensor, "n d"], t: Tensor | float, names: Sequence[str]) -> Float[Tensor, "m n d"]:
        """Every named network at every point; t in (0, 1], one for all or one a point `(n,)`."""
        unknown = [name for name in names if name not in self.states]
        if unknown or not names:
            raise ValueError(f"no such experts: {unknown}; name at least one of {list(self.names)}")
        return torch.stack([self._prediction(name, x, t) for name in names])

    def predict_each(
        self, x: Float[Tensor, "n d"], t: Tensor | float, assignment: Int64[Tensor, " n"]
    ) -> Float[Tensor, "n d"]:
        """The assigned network at each point."""
        if len(assignment) and not 0 <= int(assignment.min()) <= int(assignment.max()) < len(self.names):
            raise ValueError(f"assignment must index the {len(self.names)} networks {self.names}, received others")
        every = self.predict(x, t, self.names)
        return every[assignment, torch.arange(len(x), device=x.device)]

    def soup(self, coefficients: Mapping[str, Amount]) -> "NetworkExperts":
        """The base, and as "soup" the network whose weights are `sum_i coefficients[i] weights_i`.

        The coefficients are a preference's: over "base" and the experts, with sum 1. One-hot coefficients
        give that network, bit for bit.
        """
        active = {name: c for name, c in coefficients.items() if c != 0}
        if unknown := set(active) - set(self.names):
            raise ValueError(f"no such networks: {sorted(unknown)}; choose among {list(self.names)}")
        return NetworkExperts({BASE: self.states[BASE], SOUP: average(self.states, active)}, self.schedule)

    def _prediction(self, name: str, x: Tensor, t: Tensor | float) -> Tensor:
        times = torch.as_tensor(t, dtype=x.dtype).clamp_min(LOWEST_T).expand(len(x))
        with torch.no_grad():
            return evaluate(self.states[name], x, times)


def average(states: Mapping[str, State], coefficients: Mapping[str, Amount]) -> State:
    """`sum_i coefficients[i] states[i]`, weight by weight."""
    if len(coefficients) == 1:
        return states[next(iter(coefficients))]
    layers = next(iter(states.values()))
    return {
        layer: torch.stack([c * states[name][layer] for name, c in coefficients.items()]).sum(0) for layer in layers
    }


def train_base(
    prior: Law, schedule: NoiseSchedule, training: Training, tick: Callable[[], object] | None = None
) -> State:
    """A network trained on draws of the prior, from weights that the seed alone decides."""
    start = initial_state(len(prior.mean), training)
    return _fit([start], [prior], schedule, training, training.base_steps, training.rate, tick)[0]


def fine_tune(
    base: State,
    targets: Sequence[Law],
    schedule: NoiseSchedule,
    training: Training,
    tick: Callable[[], object] | None = None,
) -> list[State]:
    """One copy of the base for each target, trained on draws of that target, all at once."""
    starts = [base] * len(targets)
    return _fit(starts, targets, schedule, training, training.expert_steps, training.expert_rate, tick)


def train_experts(
    prior: Law,
    targets: Mapping[str, Law],
    schedule: NoiseSchedule,
    training: Training,
    tick: Callable[[], object] | None = None,
) -> NetworkExperts:
    """A base trained on the prior, and for each target an expert fine-tuned from it."""
    base = train_base(prior, schedule, training, tick)
    tuned = fine_tune(base, list(targets.values()), schedule, training, tick)
    return NetworkExperts({BASE: base} | dict(zip(targets, tuned, strict=True)), schedule)


def _fit(
    starts: Sequence[State],
    laws: Sequence[Law],
    schedule: NoiseSchedule,
    training: Training,
    steps: int,
    rate: float,
    tick: Callable[[], object] | None,
) -> list[State]:
    generator = torch.Generator().manual_seed(training.seed)
    draws = torch.stack([law.sample(POOL, generator=generator) for law in laws])
    return fit(starts, draws, schedule, steps, training.batch, rate, generator, tick)
