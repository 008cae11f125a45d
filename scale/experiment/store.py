"""The folder of a run: images, one record a batch, what the run is, and one table of everything.

    RUN/run.json              what is made, by which model, and the reference of all records
    RUN/images/<job>.png      named by the image's id
    RUN/records/<batch>.json  written after the batch's images: images are done iff it and all of its own are there
    RUN/results.parquet       one row an image, assembled when the run is over
    RUN/lock                  held by every process of a run that is alive

Every file is written whole or not at all, so a run may be killed at any moment.
"""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from dbtheory.files import write_atomically
from dbtheory.resampling import effective_size
from scale.experiment.jobs import Batch, left
from scale.hashes import sha256

RUN, RESULTS, LOCK = "run.json", "results.parquet", "lock"
IMAGES, RECORDS = "images", "records"
COSTS = ("evaluations", "reward_calls", "gradients", "seconds", "peak_memory")
CERTIFICATE = ("certificate", "disagreement", "ess", "log_weight")
# what a reader of run.json relies on
OF_RUN = {"rewards": list, "also": list, "figures": list, "paper": list, "skipped": list, "identity": dict, "jobs": int}
Row = dict[str, Any]


class Store:
    """Writes a run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: int | None = None

    def claim(self, alone: bool) -> None:
        """Hold the lock: `alone` fails where any process of another run lives; then it is shared with this run's own.

        The system frees it when a process ends, however it ends.

        Raises:
            ValueError: another run is at work in this folder; a file of that name.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"the output folder {self.folder} is a file; choose another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            if alone:
                self._remove_leftovers()
                fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise ValueError(
                f"another run is at work in {self.folder}; wait for it, or choose another folder"
            ) from error

    def release(self) -> None:
        """Let another run have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check(self, identity: Mapping[str, Any]) -> None:
        """ValueError where the folder holds another experiment: the message names what differs."""
        path = self.folder / RUN
        if path.exists():
            theirs = _read(path)
            if other := [name for name, value in identity.items() if theirs.get("identity", {}).get(name) != value]:
                raise ValueError(
                    f"{self.folder} holds a run that differs in {', '.join(other)}; choose another folder, or delete it"
                )
        elif any((self.folder / IMAGES).glob("*")) or any((self.folder / RECORDS).glob("*")):
            raise ValueError(f"{self.folder} holds images or records, but no {RUN}; choose another folder")

    def begin(self, run: Mapping[str, Any], every: Sequence[Batch]) -> set[str]:
        """Say what the run is: `run["identity"]` tells it from others. Returns the images that are `done`.

        A record that lost an image is written again with its batch, or removed where other batches take its place.
        """
        self.check(run["identity"])
        recorded = self._recorded()
        done = self._done(recorded)
        again = {self._record(batch) for batch in left(every, done)}
        for path, jobs in recorded.items():
            if not done.issuperset(jobs) and path not in again:
                path.unlink()
        _write_json(self.folder / RUN, run)
        return done

    def is_done(self, batch: Batch) -> bool:
        """Whether the batch's record and all its images are there."""
        return self._record(batch).exists() and self._has(batch.ids)

    def done(self) -> set[str]:
        """The images of every record that has all of its images, in whatever batches they were made.

        Raises:
            ValueError: a record that cannot be read.
        """
        return self._done(self._recorded())

    def write(
        self, batch: Batch, images: UInt8[Tensor, "n height width 3"], record: Mapping[str, Any], rows: Sequence[Row]
    ) -> None:
        """Write a batch: its images, then the record, which says what made them; `rows` are the images' own parts."""
        listed = []
        for job, picture, pixels, row in zip(batch.ids, batch.pictures, images, rows, strict=True):
            path = self._image(job)
            _write_png(path, pixels)
            prompt = batch.cell.prompts[picture.index]
            own = {"job": job, "prompt": prompt.text, "prompt_index": picture.index, "tag": prompt.tag}
            file = {"file": f"{IMAGES}/{path.name}", "sha256": sha256(path)}
            listed.append({**own, "seed": picture.seed, **file, **row})
        own = {"batch": batch.id, "index": batch.index, "label": batch.cell.label, "made_by": dict(batch.origin)}
        _write_json(self._record(batch), {**own, "max_rows": batch.cell.max_rows, **record, "images": listed})

    def finish(self) -> Path:
        """Assemble the table of all records."""
        path = self.folder / RESULTS
        _, frame = load(self.folder)
        write_atomically(path, lambda temporary: frame.to_parquet(temporary, index=False))
        return path

    def _recorded(self) -> dict[Path, list[str]]:
        """Every record and the images that it lists."""
        found = {}
        for path in _records(self.folder):
            try:
                found[path] = [str(image["job"]) for image in _read(path)["images"]]
            except (LookupError, TypeError) as error:
                raise ValueError(f"{path} is no record of dblend sweep: {error!r}") from error
        return found

    def _done(self, recorded: Mapping[Path, Sequence[str]]) -> set[str]:
        return {job for jobs in recorded.values() if self._has(jobs) for job in jobs}

    def _has(self, jobs: Sequence[str]) -> bool:
        return all(self._image(job).exists() for job in jobs)

    def _image(self, job: str) -> Path:
        return self.folder / IMAGES / f"{job}.png"

    def _record(self, batch: Batch) -> Path:
        return self.folder / RECORDS / f"{batch.id}.json"

    def _remove_leftovers(self) -> None:
        """The temporary files of a run that was killed: `write_atomically` begins their names with a dot."""
        for folder in (self.folder, self.folder / IMAGES, self.folder / RECORDS):
            for path in folder.glob(".*-*"):
                if path.suffix in (".png", ".json", ".parquet"):
                    path.unlink(missing_ok=True)


def load(run: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """What a run is (`run.json`, and under `missing` how many of its images are not made), and one row an image.

    Works while the run is under way. Columns: job, label, method, prompt, prompt_index, tag, seed, kl_scale,
    weight.<reward>, reward.<reward> (the preference's, then what is scored besides), weighted (sum of weight times
    reward), evaluations, reward_calls, gradients and seconds (an image's share of its batch), peak_memory (bytes, of
    the batch), certificate, disagreement, ess, log_weight, file (relative to `run`), sha256, batch. NaN where there
    is none: base has no preference. `ess` is that among all images of a prompt at one preference.

    Raises:
        ValueError: a folder that holds no run, or a record that cannot be read.
    """
    what = _read(run / RUN)
    if odd := [name for name, kind in OF_RUN.items() if not isinstance(what.get(name), kind)]:
        raise ValueError(f"{run / RUN} is no file of dblend sweep: its {odd[0]} is {what.get(odd[0])!r:.60}")
    records = [_read(path) for path in _records(run)]
    try:
        axes, also = list(what["rewards"]), list(what["also"])
        rows = [row for record in sorted(records, key=lambda r: r["index"]) for row in _rows(record, axes, also)]
        what["missing"] = what["jobs"] - len(rows)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{run} holds records that are not of dblend sweep: {error!r}") from error
    frame = pd.DataFrame(rows, columns=_columns(axes, also))
    return what, _among_all(frame, [f"weight.{name}" for name in axes])


def _records(run: Path) -> list[Path]:
    """The finished records of a run."""
    return [path for path in sorted((run / RECORDS).glob("*.json")) if not path.name.startswith(".")]


def _columns(axes: Sequence[str], also: Sequence[str]) -> list[str]:
    names = ["job", "label", "method", "prompt", "prompt_index", "tag", "seed", "kl_scale"]
    names += [f"weight.{name}" for name in axes] + [f"reward.{name}" for name in (*axes, *also)]
    return [*names, "weighted", *COSTS, *CERTIFICATE, "file", "sha256", "batch"]


def _rows(record: Mapping[str, Any], axes: Sequence[str], also: Sequence[str]) -> list[Row]:
    """The rows of a record's images."""
    images, cost, made_by = record["images"], record["cost"], record["made_by"]
    weights = {name: _number(made_by["weights"].get(name)) for name in axes}
    shares = {name: cost[name] / len(images) for name in COSTS if name != "peak_memory"}
    common = {
        "label": record["label"],
        "method": made_by["method"],
        "kl_scale": _number(made_by["kl_scale"]),
        **{f"weight.{name}": weight for name, weight in weights.items()},
        **shares,
        "peak_memory": cost["peak_memory"],
        "batch": record["batch"],
    }
    rows = []
    for image in images:
        rewards = {name: _number(image["rewards"][name]) for name in (*axes, *also)}
        certificate = image["certificate"] or {}
        if not isinstance(image["prompt"], str) or not isinstance(image["seed"], int):
            raise TypeError(f"the prompt {image['prompt']!r:.60} with the seed {image['seed']!r:.60}")
        own = {name: image[name] for name in ("job", "prompt", "prompt_index", "tag", "seed", "file", "sha256")}
        own |= {f"reward.{name}": reward for name, reward in rewards.items()}
        own |= {"weighted": sum(weights[name] * rewards[name] for name in axes)}
        rows.append({**common, **own, **{name: _number(certificate.get(name)) for name in CERTIFICATE}})
    return rows


def _among_all(frame: pd.DataFrame, weights: Sequence[str]) -> pd.DataFrame:
    """The effective sample size among all images of a prompt and preference: a batch may hold a part of them."""
    known = frame[frame["log_weight"].notna()]
    for _, group in known.groupby(["label", "kl_scale", *weights, "prompt_index"], sort=False, dropna=False):
        shares = effective_size(torch.tensor(group["log_weight"].tolist(), dtype=torch.float64))
        frame.loc[group.index, "ess"] = float(shares)
    return frame


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no table")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no file of dblend sweep: {error}") from error
    return found


def _write_json(path: Path, what: Mapping[str, Any]) -> None:
    text = json.dumps(what, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _write_png(path: Path, pixels: Tensor) -> None:
    write_atomically(path, lambda temporary: Image.fromarray(pixels.numpy()).save(temporary))
