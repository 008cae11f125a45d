"""The pipelines and schedulers that a blend must serve, made tiny, and what tests of them share."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from torch import Tensor

from dbtheory import Preference
from scale.adapters import denoiser_of
from tests.scale import tiny

PROMPTS = ("a red circle", "a blue heart and a white star")
STEPS = 5


def _picture(channels: int, seed: int) -> Tensor:
    return torch.rand(1, channels, 16, 16, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Family:
    """A kind of pipeline: how to make one, what its calls need, and how they run through its denoiser."""

    make: Callable[[], Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[tuple[str, ...], tuple[str, ...]] = (tiny.LINEAR, tiny.MIXED)
    calls: int = 1  # of the denoiser, a step
    start: int = 0  # the first of the STEPS that is evaluated

    def adapters(self, folder: Path) -> dict[str, Path]:
        """Two adapters of different layers and mixed ranks, written once."""
        style, shape = self.targets
        if not folder.exists():
            tiny.save_lora(self.make, folder / "style", 1, style, alpha=2)
            tiny.save_lora(self.make, folder / "shape", 2, shape, rank=3, ranks={"to_k": 2})
        return {"style": folder / "style", "shape": folder / "shape"}


_MASK = {"image": _picture(3, 0), "mask_image": (_picture(1, 1) > 0.5).float(), "height": 16, "width": 16}
_MMDIT = (tiny.LINEAR, tiny.MMDIT)
FAMILIES = {
    "sd": Family(tiny.sd),
    "sdxl": Family(tiny.sdxl),
    "img2img": Family(tiny.img2img, {"image": _picture(3, 0), "strength": 0.6}, start=2),
    "inpaint": Family(tiny.inpaint, {**_MASK, "strength": 0.8}, start=1),
    "inpaint of 9 channels": Family(partial(tiny.inpaint, channels=9), {**_MASK, "strength": 1.0}),
    "sd3": Family(tiny.sd3, {"max_sequence_length": 32}, _MMDIT),
    "sd3 without T5": Family(partial(tiny.sd3, t5=False), {"max_sequence_length": 32}, _MMDIT),
    "flux": Family(tiny.flux, {"max_sequence_length": 32}, _MMDIT),
    "flux without guidance": Family(partial(tiny.flux, guidance_embeds=False), {"max_sequence_length": 32}, _MMDIT),
    "flux with true guidance": Family(
        tiny.flux, {"max_sequence_length": 32, "true_cfg_scale": 3.0, "negative_prompt": "a ring"}, _MMDIT, calls=2
    ),
}


@dataclass(frozen=True)
class Sampler:
    """A scheduler in place of the pipeline's own, and `eta` for those that know it."""

    scheduler: type | None = None
    eta: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def put_on(self, *pipes: Any) -> None:
        """Give each pipeline a scheduler of its own."""
        for pipe in pipes if self.scheduler is not None else ():
            pipe.scheduler = self.scheduler.from_config(pipe.scheduler.config, **self.settings)  # pyright: ignore


SAMPLERS = {
    "its own": Sampler(),
    "DDIM": Sampler(DDIMScheduler),
    "DDIM at eta 0.5": Sampler(DDIMScheduler, 0.5),
    "DDIM at eta 1": Sampler(DDIMScheduler, 1.0),
    "DDPM": Sampler(DDPMScheduler),
    "Euler": Sampler(EulerDiscreteScheduler),
    "Euler ancestral": Sampler(EulerAncestralDiscreteScheduler),
    "DPM-Solver++": Sampler(DPMSolverMultistepScheduler),
    "DPM-Solver++, stochastic": Sampler(DPMSolverMultistepScheduler, settings={"algorithm_type": "sde-dpmsolver++"}),
    "DPM-Solver++ of a flow": Sampler(
        DPMSolverMultistepScheduler,
        settings={"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    ),
}


def latents(
    pipe: Any,
    family: Family,
    sampler: Sampler = SAMPLERS["its own"],
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = (1, 2),
    **options: Any,
) -> Tensor:
    """What an ordinary call of the pipeline ends with: one seed an image."""
    known = inspect.signature(pipe.__call__).parameters
    settings = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent", **family.options}
    if "eta" in known:
        settings["eta"] = sampler.eta
    if "negative_prompt" in settings:
        settings["negative_prompt"] = [settings["negative_prompt"]] * len(prompts)
    for name in {"image", "mask_image"} & set(settings):
        # one a picture: diffusers encodes a single one with the first seed alone, whatever the batch
        settings[name] = settings[name].expand(len(seeds), -1, -1, -1)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(list(prompts), generator=generators, **settings | options).images


def single(family: Family, file: Path | None) -> Any:
    """diffusers' own pipeline with one adapter, or none."""
    pipe = family.make()
    if file is not None:
        pipe.load_lora_weights(file)
        denoiser_of(pipe).eval()
    return pipe


def weights(style: float, kl_scale: Any = 1.0) -> Preference:
    """The preference (style, 1 - style)."""
    return Preference({"style": style, "shape": 1 - style}, kl_scale)


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


def answer_by(pipe: Any, forward: Callable[..., Tensor]) -> None:
    """Replace the denoiser's own forward, which returns a tuple of one tensor."""
    denoiser_of(pipe).forward = lambda *args, **kwargs: (forward(*args, **kwargs),)
