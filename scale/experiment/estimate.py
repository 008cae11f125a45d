"""What a run would make, and about how long it takes: nothing is made."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dbtheory.blend import AffineBlender, Step
from scale.experiment.cells import Cell, plan, shown
from scale.experiment.config import Config
from scale.experiment.entries import STEERED
from scale.experiment.jobs import Batch, count, keep, left, make_batches
from scale.experiment.make import Maker
from scale.experiment.run import identify
from scale.experiment.store import RUN, Store, load
from scale.methods import make_blender
from scale.pipeline import draw

BACKWARD = 3.0  # forwards that a forward with its gradient takes


def estimate(config: Config, out: Path, *, limit: int | None = None) -> dict[str, Any]:
    """Cells, images, evaluations (rows through the denoiser) and seconds on one process like this one.

    Seconds come from the batches that the folder holds, or else from a few evaluations of a batch's shape and a decode;
    for methods that ask rewards on the way (code, rgg) they are rough.

    Raises:
        ValueError: as `run.sweep`.
    """
    cells, skipped = plan(config)
    store = Store(out)
    store.check(identify(config))
    maker = Maker(config, cells)
    wanted = keep(make_batches(config, cells, maker.model, maker.scored_by), limit)
    todo = left(wanted, store.done())
    row, image = _timings(out) or _measure(maker, todo or wanted)
    guided = 2 if maker.guidance is not None and maker.guidance > 1 else 1
    rows = {id(cell): guided * rows_an_image(cell, config.steps) for cell in cells}
    listed = [
        {
            "label": cell.label,
            "preference": shown(cell),
            "images": count([batch for batch in wanted if batch.cell is cell]),
            "left": count([batch for batch in todo if batch.cell is cell]),
            "evaluations": rows[id(cell)],
            "seconds": _seconds(cell, config.steps, rows[id(cell)], row, image),
        }
        for cell in cells
    ]
    return {
        "title": config.title,
        "cells": listed,
        "skipped": [{"label": s.label, "preference": shown(s), "reason": s.reason} for s in skipped],
        "images": sum(cell["images"] for cell in listed),
        "left": sum(cell["left"] for cell in listed),
        "evaluations": sum(cell["left"] * cell["evaluations"] for cell in listed),
        "seconds": sum(cell["left"] * cell["seconds"] for cell in listed),
    }


def rows_an_image(cell: Cell, steps: int) -> int:
    """Rows that one image sends through the denoiser without guidance."""
    if cell.method in STEERED:
        return steps * cell.options.get("candidates", 1)
    if cell.blend is None:
        return steps
    method, preference = cell.blend
    experts = _used(preference.coefficients())
    if method == "mpa-held":
        first = math.ceil(cell.options["exact"] * steps)
        return first * experts + steps - first
    blender = make_blender(method, preference, tuple(cell.adapters), **cell.options)
    if isinstance(blender, AffineBlender):
        step = Step(0, steps, 1.0, 1.0 - 1 / steps, torch.zeros(1))
        return steps * _used(blender.coefficients(step))
    return steps * (experts if method == "msdda" else 1)


def _used(coefficients: Mapping[str, Any]) -> int:
    """How many models are asked: those whose coefficient is not zero."""
    return sum(bool(torch.as_tensor(c).any()) for c in coefficients.values())


def as_text(figures: Mapping[str, Any]) -> str:
    """The figures as lines."""
    lines = [figures["title"], f"{'images':>7} {'left':>7} {'evaluations':>12} {'s/image':>8}  method and preference"]
    lines += [
        f"{cell['images']:>7} {cell['left']:>7} {cell['images'] * cell['evaluations']:>12} {cell['seconds']:>8.2f}"
        f"  {cell['label']}: {cell['preference']}"
        for cell in figures["cells"]
    ]
    lines += [f"skipped: {cell['label']}: {cell['preference']}: {cell['reason']}" for cell in figures["skipped"]]
    total = f"{figures['left']} of {figures['images']} images are left: {figures['evaluations']} evaluations"
    return "\n".join([*lines, f"{total}, about {duration(figures['seconds'])} on one process like this one"])


def duration(seconds: float) -> str:
    """In the largest unit that fits."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _seconds(cell: Cell, steps: int, rows: int, row: float, image: float) -> float:
    """Of one image; steered methods also decode on the way."""
    if cell.method == "code":
        decodes = cell.options["candidates"] * math.ceil(steps / cell.options["block"])
        return rows * row + (1 + decodes) * image
    if cell.method == "rgg":
        return BACKWARD * (rows * row + steps * image)
    return rows * row + image


def _timings(out: Path) -> tuple[float, float] | None:
    """Seconds a row of the denoiser, all else of an image included, from what the folder holds."""
    if not (out / RUN).exists():
        return None
    rows = load(out)[1].to_dict("records")
    plain = [row for row in rows if row["method"] not in STEERED]
    return (sum(row["seconds"] for row in plain) / sum(row["evaluations"] for row in plain), 0.0) if plain else None


def _measure(maker: Maker, batches: Sequence[Batch]) -> tuple[float, float]:
    """Seconds a row of the denoiser, and of all else of an image: runs of one and of three steps, after one untimed."""
    pictures = max((batch.pictures for batch in batches), key=len)
    seconds = []
    for steps in (1, 1, 3):
        start = time.perf_counter()
        next(draw(maker.pipe, pictures, steps=steps, guidance=maker.guidance, batch_size=len(pictures)))
        seconds.append(time.perf_counter() - start)
    _, one, three = seconds
    n = len(pictures)
    guided = 2 if maker.guidance is not None and maker.guidance > 1 else 1
    step = max(0.0, three - one) / 2
    return step / (n * guided), max(0.0, one - step) / n
