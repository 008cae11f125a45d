"""Put a blend on any diffusers text-to-image pipeline, and take it off again."""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel, UNet2DConditionOutput
from torch import Tensor

from dbtheory.blend import Blender, Step
from dbtheory.preference import BASE, Preference
from scale.adapters import denoiser_of, load_adapter
from scale.experts import AdapterSwitch, LoraExperts
from scale.methods import make_blender

HOOK = "diffusion_blend"


def attach(
    pipe: DiffusionPipeline, adapters: Mapping[str, str | Path], preference: Preference, method: str = "mpa"
) -> "Knob":
    """Load `adapters` (name -> LoRA file or folder) and blend them at every step of the pipeline's ordinary calls.

    `method` is "base", "mpa", "kla" or "mpa-ls". Schedulers, guidance, batches and callbacks keep working. The
    returned knob changes the preference and detaches.

    Raises:
        ValueError: what `make_blender` and `load_adapter` refuse; a pipeline that already has a blend, or adapters of
            its own (fuse or unload them first). The pipeline is then as it was.
    """
    blender = make_blender(method, preference, adapters)
    denoiser = denoiser_of(pipe)
    if held := ", ".join(getattr(denoiser, "peft_config", {})):
        if HOOK in getattr(getattr(denoiser, "_diffusers_hook", None), "hooks", {}):
            raise ValueError("the denoiser already has a blend attached; detach it first, or set knob.preference")
        raise ValueError(f"the denoiser already has adapters ({held}); call pipe.unload_lora_weights() first")
    trainable = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    try:
        for name, path in adapters.items():
            load_adapter(pipe, path, name)
        return Knob(pipe, tuple(adapters), preference, method, blender, trainable)
    except BaseException:
        _unload(denoiser, trainable)
        raise


class Knob:
    """The handle of an attached blend."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        adapters: tuple[str, ...],
        preference: Preference,
        method: str,
        blender: Blender,
        trainable: Sequence[torch.nn.Parameter],
    ) -> None:
        self.method = method
        self._denoiser, self._trainable = denoiser_of(pipe), trainable
        self._adapters, self._preference = adapters, preference
        self._hook = BlendHook(pipe, (BASE, *adapters), blender)
        self._attached = True
        HookRegistry.check_if_exists_or_initialize(self._denoiser).register_hook(self._hook, HOOK)

    @property
    def preference(self) -> Preference:
        """The preference that the next step follows; set it at any time (ValueError as in `attach`)."""
        return self._preference

    @preference.setter
    def preference(self, preference: Preference) -> None:
        if not self._attached:
            raise ValueError("this blend is detached, so a preference has no effect; attach again")
        self._hook.blender = make_blender(self.method, preference, self._adapters)
        self._preference = preference

    def detach(self) -> None:
        """Remove the blend and its adapters: the pipeline is as it was before `attach`, bit for bit. Once is enough."""
        if self._attached:
            HookRegistry.check_if_exists_or_initialize(self._denoiser).remove_hook(HOOK, recurse=False)
            self._hook.switch.remove()
            _unload(self._denoiser, self._trainable)
            self._attached = False


class BlendHook(ModelHook):
    """Answers each call of the denoiser by the blend of its experts' predictions."""

    def __init__(self, pipe: DiffusionPipeline, names: tuple[str, ...], blender: Blender) -> None:
        super().__init__()
        self.pipe, self.names, self.blender = pipe, names, blender
        denoiser = denoiser_of(pipe)
        self.switch = AdapterSwitch(denoiser)
        self.signature = inspect.signature(type(denoiser).forward)
        self.clock = Clock()

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's forward with one more meaning: same arguments, same type of result."""
        given = dict(self.signature.bind(module, *args, **kwargs).arguments)
        _, *names = given
        given |= given.pop("kwargs", {})
        first, x, t = names[0], given[names[0]], given["timestep"]
        conditioning = {name: given[name] for name in given if name not in ("self", first, "timestep")}
        forward = self.fn_ref.original_forward
        assert forward is not None

        def evaluate(x: Tensor, t: Tensor, **rest: Any) -> Any:
            return forward(**{first: x, "timestep": t}, **rest)

        experts = LoraExperts(self.pipe, self.names, self.switch, evaluate).bind(**conditioning)
        blended = self.blender(experts, x, t, self.clock.step(self.pipe.scheduler, x))
        if given.get("return_dict", True):
            return _output_class(module)(sample=blended)
        return (blended,)


class Clock:
    """Counts the steps of a trajectory and keeps each row's phase."""

    def __init__(self) -> None:
        self.timesteps: Tensor | None = None
        self.index = 0
        self.phase = torch.empty(0)

    def step(self, scheduler: Any, x: Tensor) -> Step:
        """Where this call stands; a pipeline call sets its scheduler's timesteps anew, which starts a trajectory."""
        if scheduler.timesteps is not self.timesteps or not len(self.phase):
            self.timesteps, self.index, self.phase = scheduler.timesteps, 0, phases(x)
        if len(self.phase) != len(x):  # a callback has turned guidance on or off: the same images, twice or once
            self.phase = self.phase.repeat(len(x) // len(self.phase) + 1)[: len(x)]
        index, self.index = self.index, self.index + 1
        times = scheduler.timesteps / scheduler.config.num_train_timesteps
        t_next = times[index + 1] if index + 1 < len(times) else 0.0
        return Step(index, len(times), times[min(index, len(times) - 1)], t_next, self.phase)


def phases(x: Tensor) -> Tensor:
    """One uniform on [0, 1) a row (float64), a hash of the row's own first latents.

    So a draw depends on the image's seed alone: not on batch, order or process. The two rows that guidance makes of
    one image hold the same latents, hence follow the same experts.
    """
    rows = x.detach().to("cpu", torch.float32).flatten(1).numpy()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return torch.tensor([(int.from_bytes(digest, "big") >> 11) / 2**53 for digest in digests], dtype=torch.float64)


def _output_class(module: torch.nn.Module) -> type:
    return UNet2DConditionOutput if isinstance(module, UNet2DConditionModel) else Transformer2DModelOutput


def _unload(denoiser: Any, trainable: Sequence[torch.nn.Parameter]) -> None:
    """Take all adapters off, and give back the gradients that peft switches off in the base model."""
    if getattr(denoiser, "peft_config", None):
        denoiser.unload_lora()
    for parameter in trainable:
        parameter.requires_grad_(True)
