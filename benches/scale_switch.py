"""How long it takes to change the adapters of a whole denoiser, beside what peft takes."""

from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from benches.scale_contestants import Task
from benches.scale_models import load, pipeline, sharing
from benches.timing import Timing, take_turns
from scale.switch import AdapterSwitch

PEER = "peft, set_adapters"


def measure(
    task: Task, unet: UNet2DConditionModel, paths: Mapping[str, Path], repeats: int, calls: int = 20
) -> dict[str, Timing]:
    """The time of one switch of every kind, each from the mean of `calls` to different adapters, in turns."""
    twin = sharing(task.model, unet)
    pipe, names = pipeline(task.model, twin), list(paths)
    for name, path in paths.items():
        load(pipe, path, name)
    switch = AdapterSwitch(twin, names)
    turn, rows, m = cycle(names), list(names), len(names)

    def alone() -> None:
        switch.select([next(turn)])

    def both() -> None:
        alone()
        rows.append(rows.pop(0))
        switch.select(rows)

    def soup() -> None:
        switch.select_soup(torch.full((1, m), 1 / m), "deltas")

    def peft() -> None:
        pipe.set_adapters(next(turn))

    kinds: dict[str, Callable[[], None]] = {
        "one adapter for all rows": alone,
        "that, then an adapter a row": both,
        "a soup": soup,
        PEER: peft,
    }
    timings = take_turns({name: lambda f=f: _repeat(f, calls, task.device) for name, f in kinds.items()}, repeats)
    switch.remove()
    return {name: Timing(timing.wall / calls, timing.cpu / calls) for name, timing in timings.items()}


def _repeat(function: Callable[[], None], calls: int, device: str) -> None:
    for _ in range(calls):
        function()
    if device != "cpu":
        torch.cuda.synchronize()
