"""`python -m benches.scale`: the blend's speed and memory on real denoisers, as ratios to plain diffusers'."""

import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from diffusers.utils import logging
from rich.console import Console

from benches import scale_child, scale_layer, scale_switch
from benches.core import Row
from benches.output import JsonFile, write_record
from benches.scale_contestants import DEFAULT, PLAIN, REFERENCE, Contestant, Task, known
from benches.scale_models import ARCHITECTURES, random_unet, room_for, save_adapters
from benches.scale_report import figures_table, layers_table, rows_table, targets
from benches.timing import take_turns

Key = tuple[str, int]
Figures = dict[Key, dict[str, float]]
PARTS = ("observe", "time", "switch", "layer")
ALONE = (PLAIN, "base")  # one adapter, whatever the numbers of adapters
FROM_TWO = ("mpa sequential",)  # with one adapter it is mpa
LAYER_RANKS = (4, 64)


@dataclass(frozen=True)
class Options:
    """What is measured. The defaults are for a CPU; benches/README.md has the commands for a GPU."""

    task: tyro.conf.OmitArgPrefixes[Task] = field(default_factory=Task)
    """The images that every contestant makes."""
    methods: tuple[str, ...] = DEFAULT
    """Contestants, also mpa-held. Plain diffusers with one adapter, to which all are compared, always takes part."""
    adapters: tuple[int, ...] = (1, 2, 4)
    """Numbers of adapters."""
    parts: tuple[str, ...] = PARTS
    """observe: evaluations, memory and overhead; time; switch: of adapters; layer: the products of one layer."""
    repeats: int = 3
    """Turns of each contestant; medians are shown."""
    threads: int = torch.get_num_threads()
    """Threads on the CPU."""

    def __post_init__(self) -> None:
        known(self.task.model, self.methods, self.adapters)
        if unknown := set(self.parts) - set(PARTS):
            raise ValueError(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
        side = ARCHITECTURES[self.task.model].divisor
        if self.task.latents % side or min(self.task.steps, self.task.batch, self.repeats, self.threads) < 1:
            raise ValueError(f"latents must be a multiple of {side}; steps, batch, repeats and threads 1 or more")

    @property
    def keys(self) -> list[Key]:
        """Every contestant: a method and a number of adapters."""
        keys = [(PLAIN, 1)]
        for method in self.methods:
            counts = (1,) if method in ALONE else self.adapters
            keys += [(method, m) for m in counts if m > 1 or method not in FROM_TWO]
        return list(dict.fromkeys(keys))


def fitting(keys: list[Key], task: Task, console: Console) -> list[Key]:
    """The contestants whose models fit into the memory that is free; a line for each that does not."""
    copies = room_for(task.model, task.torch_dtype, task.device)
    large = [key for key in keys if key[0] == REFERENCE and key[1] > copies]
    for method, m in large:
        console.print(f"{method} with {m} models is left out: memory has room for {copies}")
    return [key for key in keys if key not in large]


def observe(options: Options, keys: list[Key], console: Console) -> Figures:
    """What each contestant does and holds, each in a process of its own, one after the other."""
    figures = {}
    for method, m in keys:
        console.print(f"observing {method}, m = {m}", style="dim")
        figures[method, m] = scale_child.observe(options.task, method, m, options.threads)
    return figures


def time_all(options: Options, keys: list[Key], folder: Path) -> Figures:
    """Seconds an image, and the ratio to plain: all in this process, in turns, on the same weights in memory."""
    task = options.task
    paths = save_adapters(task.model, folder, max(m for _, m in keys), task.rank)
    copies = max([1, *(m for method, m in keys if method == REFERENCE)])
    unets = [random_unet(task.model, task.torch_dtype, task.device) for _ in range(copies)]
    contestants = {
        (method, m): Contestant(task, method, unets[: m if method == REFERENCE else 1], first(paths, m))
        for method, m in keys
    }
    timings = take_turns({name(key): contestant for key, contestant in contestants.items()}, options.repeats)
    plain = timings[name((PLAIN, 1))]
    figures = {}
    for key in keys:
        taken = timings[name(key)]
        ratios = {"ratio": taken.wall / plain.wall, "cpu_ratio": taken.cpu / plain.cpu}
        figures[key] = {"seconds": taken.wall / task.batch, "cpu_seconds": taken.cpu / task.batch, **ratios}
    return figures


def time_switches(options: Options, folder: Path) -> list[Row]:
    """A switch of a denoiser's adapters in milliseconds, ours and peft's, with the largest number of adapters."""
    task = options.task
    paths = save_adapters(task.model, folder, max(options.adapters), task.rank)
    unet = random_unet(task.model, task.torch_dtype, task.device)
    timings = scale_switch.measure(task, unet, paths, max(5, options.repeats))
    return [
        Row("switch", what, 1e3 * timing.wall, "ms", asdict(timing), None if what == scale_switch.PEER else 0.5, "<=")
        for what, timing in timings.items()
    ]


def time_layers(options: Options) -> list[dict[str, Any]]:
    """Seconds of every way through one LoRA layer, for two ranks and every number of adapters above one."""
    found = []
    for rank in LAYER_RANKS:
        for m in (m for m in options.adapters if m > 1):
            for shape, timings in scale_layer.measure(options.task, m, rank, max(5, options.repeats)).items():
                seconds = {way: timing.wall for way, timing in timings.items()}
                found.append({**asdict(shape), "rank": rank, "adapters": m, "seconds": seconds})
    return found


def first(paths: Mapping[str, Path], m: int) -> dict[str, Path]:
    """The first m adapters."""
    return dict(list(paths.items())[:m])


def name(key: Key) -> str:
    """A contestant on paper."""
    return f"{key[0]}, m = {key[1]}"


def environment(options: Options) -> dict[str, Any]:
    """What the figures depend on."""
    versions = {package: version(package) for package in ("torch", "diffusers", "peft")}
    gpu = {"gpu": torch.cuda.get_device_name()} if options.task.device != "cpu" else {}
    choices = {"repeats": options.repeats, "threads": options.threads}
    return {**asdict(options.task), **choices, "machine": platform.machine(), **gpu, "versions": versions}


def measure(options: Options, console: Console) -> dict[str, Any]:
    """All parts, printed: `{"environment": ..., "figures": [...], "rows": [...], "layers": [...]}`."""
    facts = environment(options)
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()))
    keys = fitting(options.keys, options.task, console)
    figures: Figures = {key: {} for key in keys}
    with tempfile.TemporaryDirectory() as folder:
        for part, run in (
            ("observe", lambda: observe(options, keys, console)),
            ("time", lambda: time_all(options, keys, Path(folder))),
        ):
            for key, found in run().items() if part in options.parts else ():
                figures[key] |= found
        rows = targets(figures, options.task)
        rows += time_switches(options, Path(folder)) if "switch" in options.parts else []
    layers = time_layers(options) if "layer" in options.parts else []
    for table in (figures_table(figures, options.task), rows_table(rows), layers_table(layers)):
        if table.row_count:
            console.print(table)
    listed = [{"method": method, "adapters": m, **found} for (method, m), found in figures.items() if found]
    marked = [asdict(row) | {"met": row.met} for row in rows]
    return {"environment": facts, "figures": listed, "rows": marked, "layers": layers}


def main(
    options: Annotated[Options, tyro.conf.OmitArgPrefixes] = Options(),
    json_file: JsonFile = None,
) -> None:
    """Prints what a blend costs on a real denoiser beside plain diffusers and the reference's design, from one run.

    Args:
        options: What is measured.
    """
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    console = Console()
    record = measure(options, console if console.is_terminal else Console(width=150))
    write_record(json_file, record)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
