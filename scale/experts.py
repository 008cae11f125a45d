"""Many adapters on one denoiser: what a blender sees of a diffusers model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Int64
from torch import Tensor

from dbtheory.experts import Points
from dbtheory.parametrization import Parametrization
from dbtheory.preference import BASE
from dbtheory.schedule import VPDiscrete
from scale.adapters import denoiser_of, lora_layers

PEFT_BASE = "__base__"  # peft's name for "no adapter" in a mixed batch
PARAMETRIZATIONS: dict[str, Parametrization] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# Arguments of a denoiser without a batch dimension, whatever their first size happens to be.
UNBATCHED = ("img_ids", "txt_ids")


class AdapterSwitch:
    """Which adapter acts on which row of the next forward of one denoiser."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self.layers = lora_layers(denoiser)
        self.rows: list[str] | None = None
        self._handles = [layer.register_forward_pre_hook(self._name_rows, with_kwargs=True) for layer in self.layers]

    def remove(self) -> None:
        """Take the row hooks off the layers."""
        for handle in self._handles:
            handle.remove()

    def select(self, rows: Sequence[str]) -> None:
        """One adapter name (or "base") a row. A batch of one adapter alone takes peft's ordinary path."""
        alone = set(rows) if len(set(rows)) == 1 else None
        self.rows = None if alone else [PEFT_BASE if name == BASE else name for name in rows]
        # peft's own set_adapter walks every module and toggles gradients: 5 to 25 ms on SD and SDXL
        active = [name for name in alone or () if name != BASE]
        for layer in self.layers:
            layer._active_adapter = active
            layer._disable_adapters = False

    def _name_rows(self, layer: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (args, kwargs | {"adapter_names": self.rows}) if self.rows is not None else (args, kwargs)


@dataclass(frozen=True)
class LoraExperts:
    """One denoiser and its adapters as `dbtheory.Experts`; `bind` a call's conditioning before predicting.

    Times are what the denoiser takes (diffusers' timesteps, 0 = data). The parametrisation is the scheduler's.
    """

    pipe: DiffusionPipeline
    names: tuple[str, ...]
    switch: AdapterSwitch
    forward: Callable[..., Any]
    conditioning: Mapping[str, Any] | None = None

    @property
    def parametrization(self) -> Parametrization:
        return PARAMETRIZATIONS[self.pipe.scheduler.config.prediction_type]

    @property
    def schedule(self) -> VPDiscrete:
        config = self.pipe.scheduler.config
        if getattr(config, "beta_schedule", None) != "scaled_linear":
            raise ValueError(f"{type(self.pipe.scheduler).__name__} has no scaled-linear betas: no schedule is known")
        return VPDiscrete(config.beta_start, config.beta_end, config.num_train_timesteps)

    @property
    def event_shape(self) -> tuple[int, ...]:
        config = denoiser_of(self.pipe).config
        return (config.in_channels, config.sample_size, config.sample_size)

    @property
    def dtype(self) -> torch.dtype:
        return denoiser_of(self.pipe).dtype

    @property
    def device(self) -> torch.device:
        return denoiser_of(self.pipe).device

    def bind(self, **conditioning: Any) -> "LoraExperts":
        """The same experts under the denoiser's other arguments, e.g. `encoder_hidden_states (n, tokens, width)`."""
        return replace(self, conditioning=conditioning)

    def predict(self, x: Points, t: Tensor | float, names: Sequence[str]) -> Tensor:
        """Every named expert at every point: (len(names), *x.shape), in one forward of `len(names) * n` rows.

        Raises:
            ValueError: an unknown name, or none.
        """
        unknown = [name for name in names if name not in self.names]
        if unknown or not names:
            raise ValueError(f"no such experts: {unknown}; name at least one of {list(self.names)}")
        m, n = len(names), len(x)
        rows = [name for name in names for _ in range(n)]
        times = tile(torch.as_tensor(t, device=x.device), n, m)
        out = self._evaluate(rows, tile(x, n, m), times, tile(dict(self.conditioning or {}), n, m))
        return out.unflatten(0, (m, n))

    def predict_each(self, x: Points, t: Tensor | float, assignment: Int64[Tensor, " n"]) -> Points:
        """One expert a row, in one forward of `n` rows: `assignment (n,)` indexes `names`; ValueError outside it."""
        chosen = assignment.tolist()
        if not all(0 <= i < len(self.names) for i in chosen):
            raise ValueError(f"assignment must index the {len(self.names)} experts {self.names}, received {chosen}")
        rows = [self.names[i] for i in chosen]
        return self._evaluate(rows, x, torch.as_tensor(t, device=x.device), dict(self.conditioning or {}))

    def _evaluate(self, rows: list[str], x: Tensor, t: Tensor, conditioning: dict[str, Any]) -> Tensor:
        self.switch.select(rows)
        return self.forward(x, t, **(conditioning | {"return_dict": False}))[0]


def tile(value: Any, n: int, m: int, name: str = "") -> Any:
    """Repeat every tensor of `n` rows inside a denoiser's argument `m` times; other values pass unchanged."""
    if m == 1 or name in UNBATCHED:
        return value
    if isinstance(value, Tensor):
        batched = value.ndim > 0 and value.shape[0] == n
        return value.repeat(m, *[1] * (value.ndim - 1)) if batched else value
    if isinstance(value, dict):
        return {key: tile(part, n, m, key) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(tile(part, n, m) for part in value)
    return value
