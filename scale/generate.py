"""`dblend generate`: prompts in, PNG files and the record of what made them out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale import mini
from scale.attachment import Knob, attach
from scale.folder import RECORD, earlier_pictures, remove_earlier, save_picture, write_record
from scale.pipeline import Picture, draw, guidance_in_force, open_pipeline, set_scheduler
from scale.progress import progress_bar
from scale.record import settings, update_ess
from scale.request import Request
from scale.rewards import SCORERS, Scorer, load_scorer


def generate(request: Request) -> Path:
    """Make the images of a request; returns the path of the record, which is brought up to date after every batch.

    The folder may hold an earlier run: its record and pictures go when the first new ones are there.

    Raises:
        ValueError: a folder with pictures that are not an earlier run's (before the model is loaded); anything wrong
            with the model or the adapters; too little memory for one image.
        OSError: a picture or the record cannot be written; what was written before stays.
    """
    earlier = earlier_pictures(request.out)
    pipe = open_pipeline(request.model or mini.MODEL, request.torch_dtype, offload=request.offload)
    if request.scheduler is not None:
        set_scheduler(pipe, request.scheduler)
    adapters, knob = request.chosen_adapters(), _attach(pipe, request)
    guidance = guidance_in_force(pipe, request.guidance, request.model)
    scorers = [load_scorer(name) for name in SCORERS]
    request.out.mkdir(parents=True, exist_ok=True)
    record = settings(request, adapters, pipe, guidance)
    with progress_bar() as bar:
        task = bar.add_task("images", total=len(request.pictures), note="")
        drawn = draw(
            pipe, request.pictures, steps=request.steps, guidance=guidance, eta=request.eta,
            height=request.height, width=request.width, batch_size=request.batch_size,
            whole_prompts=request.resamples, advance=lambda k: bar.update(task, advance=k),
        )  # fmt: skip
        try:
            for batch, images in drawn:
                if not record["images"]:
                    remove_earlier(request.out, earlier)
                record["images"] += _save(batch, images, knob, scorers, request.out)
                if not request.resamples:
                    update_ess(record["images"])
                write_record(request.out, record)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                "the GPU has too little memory; use a smaller batch_size or max_batch, offload, or bfloat16"
            ) from error
    return request.out / RECORD


def _attach(pipe: Any, request: Request) -> Knob | None:
    """The blend on the pipeline; nothing for the base model, which is then diffusers' own."""
    if request.preference is None:
        return None
    options = {"correct": request.correct, "max_batch": request.max_batch}
    return attach(pipe, request.chosen_adapters(), request.preference, request.method, **request.blending, **options)


def _save(
    batch: Sequence[Picture], images: Tensor, knob: Knob | None, scorers: Sequence[Scorer], out: Path
) -> list[dict[str, Any]]:
    """Write a batch's pictures; what the record says of each: its file, rewards and certificate."""
    certificate = knob.certificate if knob is not None else None
    certificates = certificate.as_dicts() if certificate is not None else [None] * len(batch)
    entries = []
    for picture, image, certified in zip(batch, images, certificates, strict=True):
        pixels = (255 * image).round().byte().permute(1, 2, 0)
        rewards = score_known(scorers, pixels.permute(2, 0, 1)[None] / 255, picture.prompt)
        entry = save_picture(out, picture, pixels.contiguous())
        entries.append({**entry, "rewards": rewards, "certificate": certified})
    return entries


def score_known(scorers: Sequence[Scorer], image: Tensor, prompt: str) -> dict[str, float]:
    """Scores of one image (1, 3, H, W) by every scorer that knows its prompt (`alignment` knows the small world's)."""
    return {scorer.name: float(scorer.score(image, [prompt])) for scorer in scorers if scorer.knows(prompt)}
