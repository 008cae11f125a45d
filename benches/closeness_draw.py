"""Latents of the shipped model under every method, from the same noise, and what each method evaluated."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from dbtheory.preference import Preference
from scale import mini
from scale.attachment import attach
from scale.mini import world
from scale.pipeline import Picture

FILE = "pytorch_lora_weights.safetensors"
SHIPPED = {name: mini.ADAPTERS / name for name in mini.EXPERTS}
REFERENCE = "mpa"
ANY = "low-discrepancy"  # the order of mpa-ls, and the default that other methods take no notice of
# the name and the order that `attach` takes
METHODS = {
    "base": ("base", ANY),
    "mpa": (REFERENCE, ANY),
    "rs": ("rs", ANY),
    "rs-factors": ("rs-factors", ANY),
    "mpa-ls iid": ("mpa-ls", "iid"),
    "mpa-ls low-discrepancy": ("mpa-ls", "low-discrepancy"),
    "mpa-held": ("mpa-held", ANY),
}


@dataclass(frozen=True)
class Drawn:
    """Final latents, a row a picture, and the evaluations of the denoiser that they took, a step and a picture."""

    latents: Float[Tensor, "n c h w"]
    evaluations: float


def pictures(prompts: int, seeds: int, start: int = 0) -> list[Picture]:
    """Held-out prompts from the `start`-th on; the seeds of a prompt follow each other."""
    chosen = list(enumerate(world.held_out_prompts()))[start : start + prompts]
    return [Picture(prompt, i, 1000 * seed + i) for i, prompt in chosen for seed in range(seeds)]


def draw_latents(
    pipe: DiffusionPipeline,
    pictures: Sequence[Picture],
    *,
    steps: int,
    eta: float,
    take: int | None = None,
    batch_size: int = 16,
) -> Drawn:
    """`scale.pipeline.draw` up to the autoencoder: a generator an image, the guidance of the shipped model.

    The latents are those after the first `take` of the steps; None takes all.
    """
    call: Any = pipe
    taken = steps if take is None else take

    def stop(pipe: Any, index: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index + 1 >= taken  # diffusers' own way to stop
        return values

    made = []
    with count_rows(pipe) as rows:
        for start in range(0, len(pictures), batch_size):
            batch = pictures[start : start + batch_size]
            made += call(
                prompt=[picture.prompt for picture in batch],
                generator=[torch.Generator().manual_seed(picture.seed) for picture in batch],
                num_inference_steps=steps,
                guidance_scale=mini.GUIDANCE,
                eta=eta,
                output_type="latent",
                callback_on_step_end=stop,
            ).images
    guided = 2  # the conditional and the unconditional row of each picture
    return Drawn(torch.stack(made), rows[0] / (guided * taken * len(pictures)))


def blended(
    pipe: DiffusionPipeline,
    pictures: Sequence[Picture],
    method: str,
    preference: Preference,
    adapters: Mapping[str, Path],
    **how: Any,
) -> Drawn:
    """`draw_latents` with one of `METHODS` attached."""
    name, order = METHODS[method]
    knob = attach(pipe, adapters, preference, name, order=order)
    try:
        return draw_latents(pipe, pictures, **how)
    finally:
        knob.detach()


@torch.no_grad()
def decode(pipe: Any, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 height width"]:
    """The images in [0, 1] of final latents, as the pipeline makes them."""
    images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    return pipe.image_processor.postprocess(images, output_type="pt").float().cpu()


@contextmanager
def count_rows(pipe: Any) -> Iterator[list[int]]:
    """Counts the rows that reach the denoiser's first layer, whoever calls it."""
    rows = [0]

    def count(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        rows[0] += len(args[0])

    handle = pipe.unet.conv_in.register_forward_pre_hook(count)
    try:
        yield rows
    finally:
        handle.remove()


def scaled_adapters(folder: Path, scale: float) -> dict[str, Path]:
    """Copies of the shipped adapters whose deltas are `scale` times as large."""
    paths = {}
    for name in mini.EXPERTS:
        weights = load_file(mini.ADAPTERS / name / FILE)
        scaled = {key: value * scale if ".lora_B." in key else value for key, value in weights.items()}
        paths[name] = folder / f"{scale:g}" / name
        paths[name].mkdir(parents=True)
        save_file(scaled, paths[name] / FILE)
    return paths
