"""Opening diffusers pipelines, and drawing seeded pictures from them."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import Tensor

from scale import mini

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "flow-euler": diffusers.FlowMatchEulerDiscreteScheduler,
}


@dataclass(frozen=True)
class Picture:
    """One image to make: a prompt, its place in the list of prompts, and a seed."""

    prompt: str
    index: int
    seed: int


def open_pipeline(model: str | Path, dtype: torch.dtype = torch.float32, *, offload: bool = False) -> DiffusionPipeline:
    """A diffusers folder or hub id as a pipeline, on the GPU if there is one.

    Any pipeline that makes images from prompts alone: those of Stable Diffusion 1 to 3, SDXL, Flux. With `offload`
    (accelerate's model offload) each part of the model is on the GPU only while it runs.

    Raises:
        ValueError: a folder without `model_index.json`, a file, an id that cannot be loaded, a pipeline that needs
            more than a prompt, or `offload` without a GPU.
    """
    require_gpu_for(offload)
    folder = Path(model)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is no diffusers model: it holds no model_index.json; save one with save_pretrained")
    if not folder.exists() and (str(model).count("/") != 1 or str(model).startswith((".", "/", "~"))):
        raise ValueError(f"no model at {model}; give a diffusers folder, or a hub id such as owner/name")
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()  # one bar for every part of the model
    try:
        pipe = DiffusionPipeline.from_pretrained(str(model), dtype=dtype)
    except Exception as error:  # a broken folder makes diffusers raise nearly anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"cannot load the model {model}: {reason}") from error
    accepted = inspect.signature(pipe.__call__).parameters
    if "prompt" not in accepted or "image" in accepted:
        raise ValueError(f"{type(pipe).__name__} of {model} does not make images from prompts alone")
    pipe.set_progress_bar_config(disable=True)
    if offload:
        pipe.enable_model_cpu_offload()
        return pipe
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def require_gpu_for(offload: bool) -> None:
    """ValueError where a model is to be offloaded from a GPU that is not there."""
    if offload and not torch.cuda.is_available():
        raise ValueError("offload moves the model between the GPU and the CPU, but there is no GPU; leave it out")


def set_scheduler(pipe: DiffusionPipeline, name: str) -> None:
    """Give a pipeline the scheduler `name` of `SCHEDULERS`, with the noise schedule of the one it has.

    Raises:
        ValueError: an unknown name, or a flow-matching scheduler for a model that is not, or the reverse.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}; the schedulers are {', '.join(SCHEDULERS)}")
    own, flow = pipe.scheduler, SCHEDULERS["flow-euler"]
    if isinstance(own, flow) != (name == "flow-euler"):
        fitting = ["flow-euler"] if isinstance(own, flow) else [other for other in SCHEDULERS if other != "flow-euler"]
        raise ValueError(
            f"the scheduler {name} cannot sample this model, which was made for {type(own).__name__}; "
            f"use {' or '.join(fitting)}"
        )
    pipe.scheduler = SCHEDULERS[name].from_config(own.config)


def guidance_in_force(pipe: Any, asked: float | None, model: str | None) -> float | None:
    """The guidance scale as asked for; else the small world's (`model` None), or the pipeline's own default."""
    if asked is not None:
        return asked
    if model is None:
        return mini.GUIDANCE
    parameter = inspect.signature(pipe.__call__).parameters.get("guidance_scale")
    return parameter.default if parameter is not None else None


def draw(
    pipe: DiffusionPipeline,
    pictures: Sequence[Picture],
    *,
    steps: int,
    guidance: float | None = None,
    eta: float = 1.0,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 16,
    whole_prompts: bool = False,
    advance: Callable[[int], object] = lambda done: None,
) -> Iterator[tuple[Sequence[Picture], Tensor]]:
    """Pictures in batches: (the batch, images (n, 3, H, W) in [0, 1] on the CPU).

    One CPU generator an image, so that an image depends on its own seed and prompt alone. `guidance`, `height` and
    `width` (pixels) are the pipeline's own where None; `eta` (1: DDIM's stochastic step, which the experts were trained
    with) reaches the pipelines and schedulers that know it. `whole_prompts` keeps the images of one prompt in one
    batch, for what makes them depend on each other. `advance(k)` is called after every k pictures.

    Raises:
        ValueError: an option that the pipeline's call does not know, what the pipeline itself refuses, images that are
            not finite, or more images of one prompt than `batch_size` with `whole_prompts`.
    """
    call: Any = pipe
    known = inspect.signature(call.__call__).parameters
    given = {"guidance_scale": guidance, "height": height, "width": width}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"{type(pipe).__name__} knows no {', '.join(unknown)}; leave it out")
    options |= {"eta": eta} if "eta" in known else {}
    for batch in batches(pictures, batch_size, whole_prompts):
        generators = [torch.Generator().manual_seed(picture.seed) for picture in batch]
        images = call(
            prompt=[picture.prompt for picture in batch],
            generator=generators,
            num_inference_steps=steps,
            output_type="pt",
            **options,
        ).images
        if not bool(torch.isfinite(images).all()):
            raise ValueError(
                "the model's images are not finite; lower kl_scale or guidance, "
                "and prefer bfloat16 or float32 to float16"
            )
        yield batch, images.float().cpu()
        advance(len(batch))


def batches(pictures: Sequence[Picture], batch_size: int, whole_prompts: bool = False) -> list[Sequence[Picture]]:
    """In their order, at most `batch_size` each; with `whole_prompts` no run of one prompt is cut.

    Raises:
        ValueError: with `whole_prompts`, a run that is longer than `batch_size`.
    """
    runs = [list(run) for _, run in groupby(pictures, lambda picture: picture.index)] if whole_prompts else []
    if (longest := max(map(len, runs), default=0)) > batch_size:
        raise ValueError(
            f"the {longest} images of a prompt depend on each other and must be in one batch, received batch_size "
            f"{batch_size}; use at least {longest}, and max_batch to bound the memory"
        )
    made: list[list[Picture]] = [[]]
    for run in runs or [[picture] for picture in pictures]:
        if len(made[-1]) + len(run) > batch_size:
            made.append([])
        made[-1] += run
    return [batch for batch in made if batch]
