"""`python -m benches.scale_profile`: where the time of a method goes, beside plain diffusers' on the same denoiser.

First by part: the pipeline around the denoiser, the blend around its forwards, the adapters' products inside them, and
the rest of the forwards. Then by operator, from torch.profiler: calls and self time. On the CPU; a GPU's queue would
have to be emptied at every layer.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers.utils import logging
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benches.scale_contestants import PLAIN, REFERENCE, Contestant, Probe, Task, known
from benches.scale_models import random_unet, save_adapters


@dataclass(frozen=True)
class Options:
    """What is profiled."""

    task: tyro.conf.OmitArgPrefixes[Task] = field(default_factory=Task)
    """The images that both make."""
    method: str = "mpa"
    """Beside plain."""
    adapters: int = 2
    """Of the method."""
    operators: int = 15
    """How many operators are shown: those that take most beyond plain's."""
    threads: int = torch.get_num_threads()
    """Threads on the CPU."""

    def __post_init__(self) -> None:
        known(self.task.model, [self.method], [self.adapters])
        if self.task.device != "cpu" or self.task.compiled:
            raise ValueError("the profile times layers, which neither a GPU nor a compiled model shows; use the CPU")


def parts(contestant: Contestant, probe: Probe) -> dict[str, float]:
    """Seconds of one image: whole, in the blend, in the forwards, in their LoRA layers, in the layers' base layers.

    Each contains the next. A first image is made before, for what happens once.
    """
    clock = Clock()
    for unet in contestant.unets:
        for layer in (module for module in unet.modules() if isinstance(module, LoraLayer)):
            clock.watch(layer, "layers")
            clock.watch(layer.base_layer, "base layers")
    contestant()
    probe.reset()
    clock.seconds = dict.fromkeys(clock.seconds, 0.0)
    start = time.perf_counter()
    contestant()
    whole = time.perf_counter() - start
    return {"image": whole, **probe.seconds, **clock.seconds}


class Clock:
    """Seconds inside modules, summed by name."""

    def __init__(self) -> None:
        self.seconds = {"layers": 0.0, "base layers": 0.0}
        self._started: list[float] = []

    def watch(self, module: Any, name: str) -> None:
        """Count the module's calls under this name; hooks that are on it already are counted with it."""

        def stop(*_: Any) -> None:
            self.seconds[name] += time.perf_counter() - self._started.pop()

        module.register_forward_pre_hook(lambda *_: self._started.append(time.perf_counter()), prepend=True)
        module.register_forward_hook(stop)


def operators(contestant: Contestant) -> dict[str, tuple[int, float]]:
    """Calls, and milliseconds without those of inner calls, of every operator in a second image."""
    contestant()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        contestant()
    return {event.key: (event.count, event.self_cpu_time_total / 1e3) for event in profiler.key_averages()}


def parts_table(found: dict[str, dict[str, float]], times: int) -> Table:
    """What each part takes on its own, in milliseconds an image, and beyond `times` plain images."""
    table = Table(title="milliseconds an image")
    for title in ("part", *found, f"beyond {times} x plain"):
        table.add_column(title, justify="left" if title == "part" else "right")
    own = {method: _own(seconds) for method, seconds in found.items()}
    plain, other = own.values()
    for part in plain:
        beyond = other[part] - times * plain[part]
        table.add_row(part, *(f"{1e3 * value:.1f}" for value in (plain[part], other[part], beyond)))
    return table


def _own(seconds: dict[str, float]) -> dict[str, float]:
    blend = seconds["blend"] or seconds["forward"]  # plain has no blend
    return {
        "pipeline and scheduler": seconds["image"] - blend,
        "blend": blend - seconds["forward"],
        "adapters in the layers": seconds["layers"] - seconds["base layers"],
        "base layers under adapters": seconds["base layers"],
        "all other layers": seconds["forward"] - seconds["layers"],
        "image": seconds["image"],
    }


def operators_table(found: Sequence[dict[str, tuple[int, float]]], times: int, count: int) -> Table:
    """The operators that take most beyond `times` plain images."""
    plain, other = found
    table = Table(title=f"operators, by self time beyond {times} x plain")
    for title in ("operator", "calls, plain", "calls", "ms, plain", "ms", "ms beyond"):
        table.add_column(title, justify="left" if title == "operator" else "right")
    lines = []
    for key, (calls, spent) in other.items():
        plain_calls, plain_spent = plain.get(key, (0, 0.0))
        lines.append((spent - times * plain_spent, key, plain_calls, calls, plain_spent, spent))
    for beyond, key, plain_calls, calls, plain_spent, spent in sorted(lines, reverse=True)[:count]:
        table.add_row(key, str(plain_calls), str(calls), f"{plain_spent:.1f}", f"{spent:.1f}", f"{beyond:.1f}")
    totals = [sum(calls for calls, _ in one.values()) for one in found]
    table.add_row("all operators", *map(str, totals), "", "", "")
    return table


def main(options: tyro.conf.OmitArgPrefixes[Options] = Options()) -> None:
    """Prints where a method's time goes, beside plain diffusers on the same denoiser."""
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    task, console = options.task, Console()
    spent, by_operator = {}, []
    with tempfile.TemporaryDirectory() as folder:
        paths = save_adapters(task.model, Path(folder), options.adapters, task.rank)
        copies = options.adapters if options.method == REFERENCE else 1
        unets = [random_unet(task.model, task.torch_dtype, task.device) for _ in range(copies)]
        for method in (PLAIN, options.method):
            weights, probe = unets[:1] if method == PLAIN else unets, Probe(task.device)
            spent[method] = parts(Contestant(task, method, weights, paths, probe), probe)
            by_operator.append(operators(Contestant(task, method, weights, paths)))
    one_model = options.method in ("base", "mpa-ls", "rs")
    times = 1 if one_model else options.adapters
    console.print(parts_table(spent, times))
    console.print(operators_table(by_operator, times, options.operators))


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
