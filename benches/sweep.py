"""`python -m benches.sweep`: what `dblend sweep` costs beside the images, and what a second process brings."""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import tyro
import yaml
from rich.console import Console

from benches.core import Row
from benches.memory import ROOT
from benches.output import JsonFile, write_record
from benches.scale_report import rows_table
from benches.timing import Timing, take_turns
from scale.attachment import attach
from scale.experiment import run as running
from scale.experiment.cells import plan
from scale.experiment.config import Config, read_config
from scale.experiment.jobs import make_batches
from scale.experiment.make import Maker
from scale.rewards.protocol import Scorer

Interval = tuple[float, float]


@dataclass(frozen=True)
class Options:
    """What is measured: a sweep on the small world, or of any config."""

    config: Path | None = None
    """Another config than the built-in one."""
    prompts: int = 64
    w: tuple[float, ...] = (0.2, 0.5, 0.8)
    """Preferences: the first reward's weight. What is attached once for all of them weighs less in longer runs."""
    steps: int = 20
    batch: int = 32
    repeats: int = 3
    """Turns of the sweep and of the bare loop, and of one process and two; medians are shown."""
    threads: int = torch.get_num_threads()
    processes: bool = True
    """Also launch one and two processes."""


def write_config(options: Options, folder: Path) -> Path:
    """Base, DB-MPA and LS, two rewards."""
    if options.config is not None:
        return options.config
    given = {
        "rewards": {"alignment": "alignment", "colorfulness": "colorfulness"},
        "also": ["jpeg"],
        "prompts": "held-out",
        "prompt_limit": options.prompts,
        "steps": options.steps,
        "guidance": 1.0,
        "batch_size": options.batch,
        "preferences": {"w": list(options.w)},
        "methods": ["base", "mpa", "mpa-ls"],
    }
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


class Bare:
    """The named peer: diffusers' pipeline in a loop, with the same batches, blends and scorers; nothing is kept."""

    def __init__(self, config: Config) -> None:
        self.config, cells = config, plan(config)[0]
        self.maker = Maker(config, cells)
        self.batches = make_batches(config, cells, self.maker.model, self.maker.scored_by)

    def __call__(self) -> None:
        pipe: Any = self.maker.pipe
        knob, cell = None, None
        for batch in self.batches:
            if batch.cell is not cell:
                if knob is not None:
                    knob.detach()
                cell, blend = batch.cell, batch.cell.blend
                knob = None if blend is None else attach(pipe, cell.adapters, blend[1], blend[0], **cell.options)
            prompts = [picture.prompt for picture in batch.pictures]
            images = pipe(
                prompts,
                generator=[torch.Generator().manual_seed(picture.seed) for picture in batch.pictures],
                num_inference_steps=self.config.steps,
                guidance_scale=self.maker.guidance,
                eta=self.config.eta,
                output_type="pt",
            ).images
            for scorer in self.maker.scorers.values():
                scorer.score(images.float().cpu(), prompts)
        if knob is not None:
            knob.detach()


class Sweep:
    """The sweep in this process, into a new folder each time; `shares` are its overheads, one a turn.

    All of it counts but the opening of the model: checks, hashes, what is attached, files, the step that is thrown away
    first, the table at the end.
    """

    def __init__(self, config: Config, pipe: Any, folder: Path) -> None:
        self.config, self.pipe, self.folder = config, pipe, folder
        self.shares: list[float] = []

    def __call__(self) -> None:
        inside: list[Interval] = []
        with ExitStack() as stack:
            parts = ((type(self.pipe.unet), "forward"), (type(self.pipe.vae), "decode"), (Scorer, "score"))
            for owner, name in parts:
                stack.enter_context(mock.patch.object(owner, name, watched(getattr(owner, name), inside)))
            wasted: list[Interval] = []
            stack.enter_context(mock.patch.object(Maker, "warm_up", watched(Maker.warm_up, wasted)))
            start = time.perf_counter()
            running.sweep(self.config, Path(tempfile.mkdtemp(dir=self.folder)))
            whole = time.perf_counter() - start
        # what the first step, which is thrown away, asks of the denoiser makes no image
        useful = [(a, b) for a, b in inside if not any(begin <= a and b <= end for begin, end in wasted)]
        self.shares.append(1 - covered(useful) / whole)


def watched(function: Callable[..., Any], intervals: list[Interval]) -> Callable[..., Any]:
    """The function, which notes when it ran, in whatever thread."""
    lock = threading.Lock()

    @functools.wraps(function)  # the blend reads the denoiser's signature
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            with lock:
                intervals.append((start, time.perf_counter()))

    return call


def covered(intervals: Sequence[Interval]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, -float("inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def throughput(config: Path, folder: Path, processes: int) -> float:
    """Rows through the denoiser a second of launched processes, from the first record on: without starting up."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launch, "-m", "scale.cli", "sweep", str(config), "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    records = sorted((folder / "records").glob("*.json"), key=lambda path: path.stat().st_mtime)
    times = [path.stat().st_mtime for path in records]
    rows = [json.loads(path.read_text())["cost"]["evaluations"] for path in records]
    # the first of every process starts the clock together
    return sum(rows[processes:]) / (times[-1] - times[processes - 1])


def measure(options: Options) -> list[Row]:
    """All rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_config(options, folder)
        config = read_config(str(path))
        bare = Bare(config)
        sweep = Sweep(config, bare.maker.pipe, folder)
        with mock.patch("scale.experiment.make.open_pipeline", return_value=bare.maker.pipe):
            timings = take_turns({"sweep": sweep, "bare loop": bare}, options.repeats)
        rows = _rows(timings, statistics.median(sweep.shares[1:]))
        if options.processes:
            turns = [[throughput(path, folder / f"{turn}-{n}", n) for n in (1, 2)] for turn in range(options.repeats)]
            one, two = (statistics.median(column) for column in zip(*turns, strict=True))
            bound = 1.9 if torch.cuda.device_count() >= 2 else None
            made_from = {"one": one, "two": two}
            rows.append(Row("processes", "two against one, 1 thread each on a CPU", two / one, "x", made_from, bound))
    return rows


def _rows(timings: Mapping[str, Timing], overhead: float) -> list[Row]:
    ours, theirs = timings["sweep"], timings["bare loop"]
    made_from = {"sweep": ours.wall, "bare": theirs.wall, "cpu_ratio": ours.cpu / theirs.cpu}
    return [
        Row("overhead", "no denoiser, VAE or scorer at work", overhead, "of the wall clock", {}, 0.03, "<="),
        Row("sweep", "whole sweep against the bare loop", ours.wall / theirs.wall, "x", made_from),
    ]


def main(
    options: Annotated[Options, tyro.conf.OmitArgPrefixes] = Options(),
    json_file: JsonFile = None,
) -> None:
    """Prints the sweep's overhead, its time beside a bare diffusers loop, and the throughput of two processes.

    Args:
        options: What is measured.
    """
    torch.set_num_threads(options.threads)
    rows = measure(options)
    console = Console()
    (console if console.is_terminal else Console(width=150)).print(rows_table(rows))
    write_record(json_file, [asdict(row) | {"met": row.met} for row in rows])


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
