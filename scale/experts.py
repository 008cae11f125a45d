"""Many adapters on one denoiser: what a blender sees of a diffusers model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dbtheory.experts import Points
from dbtheory.parametrization import Parametrization
from dbtheory.schedule import NoiseSchedule
from scale.levels import parametrization_of, schedule_of, timestep_of
from scale.switch import AdapterSwitch

# Arguments of a denoiser without a batch dimension, whatever their first size happens to be.
UNBATCHED = ("img_ids", "txt_ids")
ATTENTION_ARGUMENTS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


@dataclass
class Memory:
    """How many rows a forward may hold: None is all at once. It shrinks where the device runs out of memory."""

    max_batch: int | None = None


@dataclass
class Answer:
    """Which experts were last asked at every point, and what they predicted: (len(names), n, ...)."""

    names: Sequence[str] = ()
    predictions: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class LoraExperts:
    """One denoiser and its adapters as `dbtheory.Experts`; `bind` a call's conditioning before predicting.

    Times are in (0, 1], 0 = data; the denoiser is told the matching timestep, or the one that is bound. Parametrisation
    and schedule are the scheduler's. `forward(x, timestep, **conditioning)` is the denoiser's own. `latest` is what
    `predict` last answered.
    """

    denoiser: Any
    scheduler: Any
    names: tuple[str, ...]
    switch: AdapterSwitch
    forward: Callable[..., Any]
    conditioning: Mapping[str, Any] | None = None
    timestep: Tensor | float | None = None
    memory: Memory = field(default_factory=Memory)
    latest: Answer = field(default_factory=Answer)

    @property
    def parametrization(self) -> Parametrization:
        return parametrization_of(self.scheduler)

    @property
    def schedule(self) -> NoiseSchedule:
        """ValueError for a scheduler whose noise levels are unknown."""
        schedule = schedule_of(self.scheduler)
        if schedule is None:
            raise ValueError(f"the noise levels of {type(self.scheduler).__name__} are not known")
        return schedule

    @property
    def event_shape(self) -> tuple[int, ...]:
        config = self.denoiser.config
        size = getattr(config, "sample_size", None)  # Flux has none: its tokens have a width alone
        return (config.in_channels,) if size is None else (config.in_channels, size, size)

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    @property
    def device(self) -> torch.device:
        return self.switch.device if self.switch.layers else self.denoiser.device

    def bind(self, *, timestep: Tensor | float | None = None, **conditioning: Any) -> "LoraExperts":
        """The same experts under the denoiser's other arguments, e.g. `encoder_hidden_states (n, tokens, width)`.

        A `timestep`, as the denoiser takes it, is then what the denoiser is told at any t.
        """
        return replace(self, timestep=timestep, conditioning=conditioning)

    def predict(self, x: Points, t: Tensor | float, names: Sequence[str]) -> Tensor:
        """Every named expert at every point: (len(names), *x.shape), in one forward of `len(names) * n` rows.

        Raises:
            ValueError: an unknown name, or none.
        """
        unknown = [name for name in names if name not in self.names]
        if unknown or not names:
            raise ValueError(f"no such experts: {unknown}; name at least one of {list(self.names)}")

        def select(rows: slice, experts: slice) -> None:
            self.switch.select(names[experts], rows.stop - rows.start)

        predictions = self._in_parts(x, t, len(names), select)
        self.latest.names, self.latest.predictions = tuple(names), predictions
        return predictions

    def predict_each(self, x: Points, t: Tensor | float, assignment: Int64[Tensor, " n"]) -> Points:
        """One expert a row, in one forward of `n` rows: `assignment (n,)` indexes `names`; ValueError outside it."""
        chosen = assignment.tolist()
        if len(chosen) != len(x) or not all(0 <= i < len(self.names) for i in chosen):
            raise ValueError(f"assignment must index the {len(self.names)} experts {self.names}, received {chosen}")
        each = [self.names[i] for i in chosen]
        return self._in_parts(x, t, 1, lambda rows, _: self.switch.select(each[rows]))[0]

    def predict_soup(
        self, x: Points, t: Tensor | float, coefficients: Float[Tensor, "k m"], average: str = "deltas"
    ) -> Points:
        """One model with averaged adapters: `coefficients` of the adapters `names[1:]`, one row for all or one a point.

        `average` is "deltas" or "factors" (`AdapterSwitch.select_soup`).
        """
        if coefficients.shape not in ((1, len(self.names) - 1), (len(x), len(self.names) - 1)):
            raise ValueError(
                f"one coefficient for each of {self.names[1:]}, for all points or for each of {len(x)}, received shape "
                f"{tuple(coefficients.shape)}"
            )

        def select(rows: slice, _: slice) -> None:
            self.switch.select_soup(coefficients if len(coefficients) == 1 else coefficients[rows], average)

        return self._in_parts(x, t, 1, select)[0]

    def _in_parts(self, x: Tensor, t: Tensor | float, m: int, select: Callable[[slice, slice], None]) -> Tensor:
        """(m, *x.shape): `m` experts at every row, in as many forwards as the memory asks for."""
        while True:
            try:
                return self._forwards(x, t, m, select)
            except torch.OutOfMemoryError:
                rows = min(m * len(x), self.memory.max_batch or m * len(x))
                if rows == 1:
                    raise
                self.memory.max_batch = rows // 2

    def _forwards(self, x: Tensor, t: Tensor | float, m: int, select: Callable[[slice, slice], None]) -> Tensor:
        n = len(x)
        limit = self.memory.max_batch or m * n
        experts_at_once, rows_at_once = max(1, limit // n), min(limit, n)
        timestep = timestep_of(t, self.scheduler, self.denoiser) if self.timestep is None else self.timestep
        timestep = torch.as_tensor(timestep, device=x.device)
        given = {**(self.conditioning or {}), "return_dict": False}
        self.switch.strength = strength_of(given)
        parts = []
        for first in range(0, m, experts_at_once):
            experts = slice(first, min(m, first + experts_at_once))
            k = experts.stop - experts.start
            columns = []
            for start in range(0, n, rows_at_once):
                rows = slice(start, min(n, start + rows_at_once))
                select(rows, experts)
                told, arguments = tile((timestep, given), n, k, rows)
                out = self.forward(tile(x, n, k, rows), told, **arguments)[0]
                # the next replay of a CUDA graph overwrites what this one returned
                out = out.clone() if self.switch.compiled else out
                columns.append(out.unflatten(0, (k, -1)))
            parts.append(columns[0] if len(columns) == 1 else torch.cat(columns, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def tile(value: Any, n: int, m: int, rows: slice = slice(None), name: str = "") -> Any:
    """The `rows` of every tensor of `n` rows inside a denoiser's argument, `m` times; other values pass unchanged.

    Containers are always made anew: denoisers take residuals out of the lists that they are given.
    """
    if isinstance(value, Tensor):
        if (
            name in UNBATCHED
            or value.ndim == 0
            or value.shape[0] != n
            or (m == 1 and rows in (slice(None), slice(0, n)))
        ):
            return value
        return value[rows].repeat(m, *[1] * (value.ndim - 1))
    if isinstance(value, dict):
        return {key: tile(part, n, m, rows, key) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(tile(part, n, m, rows) for part in value)
    return value


def strength_of(conditioning: Mapping[str, Any]) -> float:
    """What diffusers' `{"scale": ...}` in the attention arguments multiplies every adapter by."""
    given = (conditioning.get(name) or {} for name in ATTENTION_ARGUMENTS)
    return next((attention["scale"] for attention in given if "scale" in attention), 1.0)
