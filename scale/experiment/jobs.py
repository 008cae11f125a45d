"""Images as jobs: their ids, the batches that they are made in, and what is left of these.

All are functions of the config and of the files' hashes, so that every process and every resumed run has the same. An
image's id does not depend on its batch.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scale.experiment.cells import Cell, shown
from scale.experiment.config import Config
from scale.experiment.entries import STEERED
from scale.hashes import adapter_hashes
from scale.pipeline import Picture, batches


@dataclass(frozen=True)
class Batch:
    """Images that are made together, of one cell."""

    index: int
    """Of the first image among all."""
    cell: Cell
    pictures: Sequence[Picture]
    ids: Sequence[str]
    """Of the images."""
    origin: Mapping[str, Any]
    """All that made them but prompt and seed."""

    @property
    def id(self) -> str:
        """Of the images together."""
        return digest({"jobs": list(self.ids)})


def make_batches(
    config: Config, cells: Sequence[Cell], model: Mapping[str, Any], rewards: Mapping[str, Any]
) -> list[Batch]:
    """All batches, cell by cell.

    `model` is what the config does not know of the model (hashes, guidance in force, dtype); `rewards` is what the
    scorers are, by axis at least: they steer some methods.

    Raises:
        ValueError: two cells that make the same image.
    """
    hashes: dict[Path, Mapping[str, str]] = {}
    made: list[Batch] = []
    owners: dict[str, Cell] = {}
    for cell in cells:
        origin = _origin(config, cell, model, rewards, hashes)
        for pictures in batches(cell.pictures, cell.batch_size, cell.resamples):
            ids = [digest(origin | {"prompt": picture.prompt, "seed": picture.seed}) for picture in pictures]
            made.append(Batch(len(owners), cell, pictures, ids, origin))
            for job in ids:
                if owners.setdefault(job, cell) is not cell:
                    raise ValueError(f"{owners[job].label} and {cell.label} at {shown(cell)} make the same images")
    return made


def keep(every: Sequence[Batch], limit: int | None) -> list[Batch]:
    """The first whole batches of each cell that hold `limit` images; all where there is no limit."""
    kept, counts = [], {}
    for batch in every:
        before = counts.get(id(batch.cell), 0)
        if limit is None or before < limit:
            kept.append(batch)
        counts[id(batch.cell)] = before + len(batch.pictures)
    return kept


def left(every: Sequence[Batch], done: Collection[str]) -> list[Batch]:
    """What is not done of these batches: whole ones, unless it was done in batches of another size."""
    found = []
    for batch in every:
        rows = [row for row, job in enumerate(batch.ids) if job not in done]
        if rows:
            pictures, ids = ([part[row] for row in rows] for part in (batch.pictures, batch.ids))
            found.append(replace(batch, index=batch.index + rows[0], pictures=pictures, ids=ids))
    return found


def count(batches: Sequence[Batch]) -> int:
    """Images in them."""
    return sum(len(batch.pictures) for batch in batches)


def digest(what: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that stand for plain data."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def _origin(
    config: Config, cell: Cell, model: Mapping[str, Any], rewards: Mapping[str, Any],
    hashes: dict[Path, Mapping[str, str]],
) -> dict[str, Any]:  # fmt: skip
    """All that makes an image but its prompt and seed, as plain data and without a path."""
    for path in cell.adapters.values():
        if path not in hashes:
            hashes[path] = adapter_hashes(path)
    middle = {"+".join(edge): name for edge, name in cell.options.get("midpoints", {}).items()}
    steered = cell.method in STEERED
    return {
        "method": cell.method,
        "weights": dict(cell.weights),
        "kl_scale": cell.kl_scale,
        "options": {**cell.options, **({"midpoints": middle} if middle else {})},
        "adapters": {name: hashes[path] for name, path in cell.adapters.items()},
        "steered_by": {axis: rewards[axis] for axis, weight in cell.weights.items() if weight} if steered else None,
        # the images of one prompt compete
        "together": cell.seeds if cell.resamples else None,
        "steps": config.steps,
        "eta": config.eta,
        "scheduler": config.scheduler,
        **model,
    }
