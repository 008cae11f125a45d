"""Opening diffusers pipelines, and drawing seeded pictures from them."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import Tensor


@dataclass(frozen=True)
class Picture:
    """One image to make: a prompt, its place in the list of prompts, and a seed."""

    prompt: str
    index: int
    seed: int


def open_pipeline(model: str | Path) -> DiffusionPipeline:
    """A diffusers folder or hub id as a pipeline in float32, on the GPU if there is one.

    Raises:
        ValueError: a folder without `model_index.json`, a file, an id that cannot be loaded, or a pipeline that needs
            more than a prompt.
    """
    folder = Path(model)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is no diffusers model: it holds no model_index.json; save one with save_pretrained")
    if not folder.exists() and (str(model).count("/") != 1 or str(model).startswith((".", "/", "~"))):
        raise ValueError(f"no model at {model}; give a diffusers folder, or a hub id such as owner/name")
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()  # one bar for every part of the model
    try:
        pipe = DiffusionPipeline.from_pretrained(str(model), dtype=torch.float32)
    except Exception as error:  # a broken folder makes diffusers raise nearly anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"cannot load the model {model}: {reason}") from error
    accepted = inspect.signature(pipe.__call__).parameters
    if "prompt" not in accepted or "image" in accepted:
        raise ValueError(f"{type(pipe).__name__} of {model} does not make images from prompts alone")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def draw(
    pipe: DiffusionPipeline,
    pictures: Sequence[Picture],
    *,
    steps: int,
    guidance: float | None = None,
    eta: float = 1.0,
    batch_size: int = 16,
    advance: Callable[[int], object] = lambda done: None,
) -> Iterator[tuple[Sequence[Picture], Tensor]]:
    """Pictures in batches: (the batch, images (n, 3, H, W) in [0, 1] on the CPU).

    One CPU generator an image, so that an image depends on its own seed and prompt alone. `guidance=None` is the
    pipeline's default; `eta` (1: DDIM's stochastic step, which the experts were trained with) reaches the pipelines
    and schedulers that know it. `advance(k)` is called after every k pictures.
    """
    call: Any = pipe
    accepted = inspect.signature(call.__call__).parameters
    options: dict[str, Any] = {"eta": eta} if "eta" in accepted else {}
    if guidance is not None:
        options["guidance_scale"] = guidance
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        generators = [torch.Generator().manual_seed(picture.seed) for picture in batch]
        images = call(
            prompt=[picture.prompt for picture in batch],
            generator=generators,
            num_inference_steps=steps,
            output_type="pt",
            **options,
        ).images
        if not bool(torch.isfinite(images).all()):
            raise ValueError("the model's images are not finite; lower kl_scale or guidance")
        yield batch, images.float().cpu()
        advance(len(batch))
