"""Running an experiment: any number of processes, killed and resumed at will, with the same result."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from scale.experiment.cells import Skipped, plan
from scale.experiment.config import Config
from scale.experiment.entries import Entry
from scale.experiment.jobs import Batch, count, digest, keep, left, make_batches
from scale.experiment.make import Maker
from scale.experiment.recorder import Recorder
from scale.experiment.store import Store
from scale.hashes import adapter_hashes
from scale.progress import progress_bar
from scale.record import PACKAGES

PATIENCE = timedelta(days=30)  # of a process that is done for the others
FOUND = ("model_files", "reward_files", "images")  # what of the identity only the files tell
# what says nothing of the images, and what hashes of files stand for
NOT_IDENTITY = ("title", "figures", "paper", "batch_size", "max_rows", "reward_models")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: images made before, now by all processes, and in all where there was no limit."""

    before: int
    made: int
    total: int
    results: Path | None


class Stopped(KeyboardInterrupt):
    """Ctrl-C: the message says what is done and how to go on."""


def sweep(config: Config, out: Path, *, limit: int | None = None) -> Outcome:
    """Make what a config describes and the folder does not yet hold; then assemble the table.

    `limit` stops after so many images of each cell, rounded up to whole batches.

    Raises:
        ValueError: a folder of another experiment, or where another run is at work, or that the processes do not
            share; what `plan` and `Maker` refuse; a scorer that fails. What was finished stays, and a later run goes on
            from there.
        OSError: a file that cannot be written.
        Stopped: Ctrl-C.
    """
    state, store = processes(), Store(out)
    cells, skipped = plan(config)
    with claimed(store, state):
        store.check(identity := identify(config))
        maker = Maker(config, cells)
        every = make_batches(config, cells, maker.model, maker.scored_by)
        run = describe(config, identity | _found(maker, every), every, skipped)
        store.check(run["identity"])
        _same_files(run["identity"])  # in all processes, and all have read what was there
        done = _agree(store.begin(run, every) if state.is_main_process else None)
        todo = left(keep(every, limit), done)
        mine = todo[state.process_index :: state.num_processes]
        _work(mine, maker, store, {"device": _device(maker.pipe._execution_device), "versions": run["versions"]})
        state.wait_for_everyone()
        if state.is_main_process and not all(store.is_done(batch) for batch in todo):
            raise ValueError(f"images of other processes are not in {out}: all of them need one folder that they share")
        results = store.finish() if state.is_main_process else None
    total = count(every)
    return Outcome(total - count(left(every, done)), count(todo), total, results)


def _work(mine: Sequence[Batch], maker: Maker, store: Store, facts: Mapping[str, Any]) -> None:
    """Make, score and write this process's batches."""
    recorder = Recorder(store, maker.scorers, facts)
    try:
        with progress_bar() as bar:
            task = bar.add_task("images", total=count(mine), note="")
            if mine:
                maker.warm_up(mine[0])
            for batch in mine:
                bar.update(task, note=batch.cell.label)
                recorder.submit(batch, maker.make(batch))
                bar.update(task, advance=len(batch.pictures))
            recorder.wait()
    except KeyboardInterrupt:
        recorder.close()
        done = sum(len(batch.pictures) for batch in mine if store.is_done(batch))
        raise Stopped(
            f"stopped: {done} of the {count(mine)} images that this process had left to make are in {store.folder}; "
            "the same command goes on from there"
        ) from None
    finally:
        recorder.close()
        maker.close()


def processes() -> PartialState:
    """This process's place among those that were launched; on a CPU each takes its share of the cores.

    Raises:
        ValueError: processes that do not know of each other.
    """
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:  # each would make everything
        raise ValueError(f"{launched} processes were launched, but only {state.num_processes} know of each other")
    if state.num_processes > 1 and not torch.cuda.is_available():
        here = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        torch.set_num_threads(max(1, _cores() // here))
    return state


@contextlib.contextmanager
def claimed(store: Store, state: PartialState) -> Iterator[None]:
    """Hold the folder's lock in every process; ValueError in all of them if the first cannot have it."""
    refusal = None
    if state.is_main_process:
        try:
            store.claim(alone=True)
        except ValueError as error:
            refusal = str(error)
    if refusal := _agree(refusal):
        raise ValueError(refusal)
    try:
        if not state.is_main_process:
            store.claim(alone=False)
        yield
    finally:
        store.release()


def identify(config: Config) -> dict[str, Any]:
    """What tells one experiment from another, as plain data: adapters by their hashes, rewards in their order."""
    methods = [_identity(method) for method in config.methods]
    return json.loads(
        json.dumps(_plain(_identity(config) | {"methods": methods, "rewards": list(config.rewards.items())}))
    )


def describe(
    config: Config, identity: Mapping[str, Any], every: Sequence[Batch], skipped: Sequence[Skipped]
) -> dict[str, Any]:
    """What `run.json` says."""
    return {
        "title": config.title,
        "rewards": list(config.rewards),
        "also": list(config.also),
        "figures": list(config.figures),
        "paper": list(config.paper),
        "jobs": count(every),
        "identity": dict(identity),
        "skipped": [asdict(cell) for cell in skipped],
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _identity(value: Config | Entry) -> dict[str, Any]:
    return {name: part for name, part in asdict(value).items() if name not in NOT_IDENTITY}


def _found(maker: Maker, every: Sequence[Batch]) -> dict[str, Any]:
    """What of the identity only the files tell: of the model, of all rewards, and of every image."""
    images = digest({"jobs": [job for batch in every for job in batch.ids]})
    return _plain({"model_files": maker.model, "reward_files": maker.scored_by, "images": images})


def _device(device: torch.device) -> str:
    """What kind, not which: who makes a batch is chance."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _plain(value: Any) -> Any:
    """Data as JSON has it; a file by its hash."""
    if isinstance(value, Path):
        return adapter_hashes(value)
    if isinstance(value, Mapping):
        return {"+".join(key) if isinstance(key, tuple) else key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _same_files(identity: Mapping[str, Any]) -> None:
    """ValueError where another process found other files than this one, e.g. an older copy on its machine."""
    everywhere = gather_object([{name: identity[name] for name in FOUND}])
    if other := [name for name in FOUND if any(found[name] != identity[name] for found in everywhere)]:
        raise ValueError(f"the processes differ in {', '.join(other)}; give every machine the same files")


def _agree(value: Any) -> Any:
    """The first process's value, in all of them."""
    return broadcast_object_list([value])[0]


def _cores() -> int:
    """That this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # this one, when it runs from a checkout
