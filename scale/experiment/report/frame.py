"""The rows that a report is made of: one or more runs together, and the base model under every preference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from scale.experiment.store import IMAGES, load

# a pandas DataFrame; its stubs give nearly every selection three types, which no checker can follow
Frame = Any

CELL = ["label", "preference", "kl_scale"]
IMAGE = ["prompt", "seed"]
COSTS = ("seconds", "evaluations", "reward_calls", "gradients", "peak_memory")
# of a run's identity: what images must have in common to be compared
SAME = ("model", "model_files", "rewards", "adapters", "steps", "guidance", "eta", "scheduler", "dtype")
DIGITS = 6  # of a weight: preferences that agree to this are the same


@dataclass(frozen=True)
class Results:
    """What some runs of the same rewards left.

    `frame` has the columns of `scale.experiment.store.load`, one row an image, and three more: `preference` (its
    name in tables), `path` (of the image) and `weighted`, which base too has: one row for each preference of the
    others, with `kl_scale` 0. `rewards` are the preference's, in order; `also` was scored for the record alone.
    """

    rewards: tuple[str, ...]
    also: tuple[str, ...]
    frame: Frame
    runs: tuple[Mapping[str, Any], ...]

    @property
    def model(self) -> str | None:
        """A diffusers folder or hub id; None for the small world."""
        return self.runs[0]["identity"].get("model")

    @property
    def missing(self) -> int:
        """Images that the runs have yet to make."""
        return sum(int(run.get("missing") or 0) for run in self.runs)

    def labels(self, *methods: str) -> list[str]:
        """The labels in order of appearance; of these methods alone if any is given."""
        return [label for label, method in self._methods.items() if not methods or method in methods]

    def method(self, label: str) -> str:
        """The method that a label names a variant of."""
        return self._methods[label]

    @cached_property
    def _methods(self) -> dict[str, str]:
        return dict(self.frame.drop_duplicates("label").set_index("label")["method"])

    def preferences(self) -> list[str]:
        """Names of the preferences, the first reward's weight rising."""
        weights = self.frame.drop_duplicates("preference").set_index("preference")[weight_columns(self.rewards)]
        return list(weights.sort_values(list(weights.columns)).index)

    def weights(self, preference: str) -> tuple[float, ...]:
        """The weight of each reward."""
        row = self.frame.loc[self.frame["preference"] == preference, weight_columns(self.rewards)].iloc[0]
        return tuple(float(value) for value in row)


def load_results(folders: Sequence[Path]) -> Results:
    """The runs of `folders` as one table; unfinished runs give what they have.

    Raises:
        ValueError: no folder, one that holds no run, runs of different rewards or models, or two runs that disagree
            about an image of the same label, preference, prompt and seed.
    """
    if not folders:
        raise ValueError("nothing to report on; give the folder of a run, or of several of the same rewards")
    loaded = [load(folder) for folder in folders]
    # an image is looked for in its run's folder alone, whatever its record says
    places = [
        [str(folder / IMAGES / Path(str(file)).name) for file in frame["file"]]
        for folder, (_, frame) in zip(folders, loaded, strict=True)
    ]
    tables = [frame.assign(path=paths) for (_, frame), paths in zip(loaded, places, strict=True)]
    return combine([run for run, _ in loaded], tables)


def combine(runs: Sequence[Mapping[str, Any]], tables: Sequence[Frame]) -> Results:
    """Runs and their tables (with `path`) as one; see `load_results`."""
    for what in SAME:
        kinds = {str(run["identity"].get(what)) for run in runs}
        if len(kinds) > 1:
            raise ValueError(
                f"the runs have different {what}: {' and '.join(sorted(kinds)):.300}; report on them apart"
            )
    rewards = tuple(runs[0]["rewards"])
    frame: Frame = pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)
    if frame.empty:
        raise ValueError("the runs hold no finished image yet; let `dblend sweep` make some first")
    also = tuple(
        c.removeprefix("reward.") for c in frame if c.startswith("reward.") and c not in reward_columns(rewards)
    )
    frame = _under_preferences(frame, rewards)
    return Results(rewards, also, _once(frame), tuple(runs))


def weight_columns(rewards: Sequence[str]) -> list[str]:
    """The columns of the preference's weights."""
    return [f"weight.{name}" for name in rewards]


def reward_columns(rewards: Sequence[str]) -> list[str]:
    """The columns of the rewards' values."""
    return [f"reward.{name}" for name in rewards]


def preference_names(weights: Sequence[tuple[float, ...]]) -> list[str]:
    """`w = 0.2` for two rewards (the weight of the first), `0.2 / 0.3 / 0.5` for more; 3 digits or more."""
    names: list[str] = []
    for digits in range(3, DIGITS + 1):
        shown = [[f"{weight:.{digits}g}" for weight in row] for row in weights]
        names = [f"w = {row[0]}" if len(row) < 3 else " / ".join(row) for row in shown]
        if len(set(names)) == len(set(weights)):
            break
    return names


def select(frame: Frame, label: str, preference: str | None = None, kl_scale: float | None = None) -> Frame:
    """The rows of a label, and of a preference and a KL scale where given."""
    rows = frame[frame["label"] == label]
    if preference is not None:
        rows = rows[rows["preference"] == preference]
    return rows if kl_scale is None else rows[np.isclose(rows["kl_scale"], kl_scale)]


def pair(*cells: Frame, columns: Sequence[str] = ("weighted",)) -> Frame:
    """Images that all cells have, by (prompt, seed): `columns` of the first cell as `0.weighted`, then `1.`..."""
    joined = None
    for number, cell in enumerate(cells):
        part = cell.set_index(IMAGE)[list(columns)].add_prefix(f"{number}.")
        joined = part if joined is None else joined.join(part, how="inner")
    assert joined is not None
    return joined.dropna().reset_index()


def _under_preferences(frame: Frame, rewards: Sequence[str]) -> Frame:
    """Base, which has no preference of its own, under each one of the others; `weighted` and names for all."""
    columns = weight_columns(rewards)
    unweighted = frame["method"] == "base"
    others = frame[~unweighted].copy()
    others[columns] = others[columns].fillna(0.0).astype(float).round(DIGITS)
    even = pd.DataFrame([[1 / len(rewards)] * len(rewards)], columns=columns).round(DIGITS)
    preferences = others[columns].drop_duplicates() if len(others) else even
    base = frame[unweighted].drop(columns=columns).merge(preferences, how="cross").assign(kl_scale=0.0)
    others["kl_scale"] = others["kl_scale"].fillna(1.0)
    whole = pd.concat([base[frame.columns], others], ignore_index=True) if len(base) else others.reset_index(drop=True)
    weights = whole[columns].to_numpy(float)
    names = preference_names([tuple(row) for row in weights.tolist()])
    weighted = (weights * whole[reward_columns(rewards)].to_numpy(float)).sum(1)
    return whole.assign(preference=names, weighted=weighted)


def _once(frame: Frame) -> Frame:
    """Each image once: several runs may have made the same."""
    keys = CELL + IMAGE
    kept = frame.drop_duplicates([*keys, "sha256"])
    if (twice := kept.duplicated(keys)).any():
        row = kept[twice].iloc[0]
        raise ValueError(
            f"two runs made different images of {row['label']}, {row['preference']}, prompt {row['prompt']!r}, seed "
            f"{row['seed']}: their settings differ; report on them apart, or give the methods different labels"
        )
    return kept.reset_index(drop=True)


def read_image(path: str) -> Image.Image:
    """An image of a run, in RGB. ValueError where the file is none."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no image: {error}; delete it, and let `dblend sweep` make it again") from error


def same_images(frames: Sequence[Frame]) -> list[Frame]:
    """Each table's rows of the (prompt, seed) pairs that all of them have."""
    shared = set.intersection(*(set(zip(frame["prompt"], frame["seed"], strict=True)) for frame in frames))
    return [frame[[key in shared for key in zip(frame["prompt"], frame["seed"], strict=True)]] for frame in frames]
