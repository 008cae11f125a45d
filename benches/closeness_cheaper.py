"""`python -m benches.closeness_cheaper`: how close to DB-MPA one comes with fewer evaluations, on the shipped model."""

import time
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import tyro
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.table import Table

from benches.closeness_draw import REFERENCE, SHIPPED, draw_latents, pictures
from benches.closeness_figures import Figure, figure, rms_distance
from benches.closeness_prototypes import candidates
from benches.output import JsonFile, write_record
from dbtheory.preference import Preference
from scale import mini
from scale.attachment import attach
from scale.pipeline import open_pipeline


@dataclass(frozen=True)
class Options:
    """What is drawn."""

    prompts: int = 24
    """Held-out prompts, from the 101st: not those of `benches.closeness`."""
    seeds: int = 1
    """Images of each prompt."""
    steps: tuple[int, ...] = (25,)
    """Numbers of DDIM steps."""
    etas: tuple[float, ...] = (1.0, 0.0)
    """DDIM's eta."""
    weight: float = 0.5
    """Weight of colorfulness; jpeg has the rest."""
    kl_scale: float = 1.0
    """Lambda."""
    only: tuple[str, ...] = ()
    """Candidates to try; all where empty."""
    threads: int = torch.get_num_threads()
    """Threads."""

    @property
    def preference(self) -> Preference:
        """Of the two shipped adapters."""
        return Preference(dict(zip(mini.EXPERTS, (self.weight, 1 - self.weight), strict=True)), self.kl_scale)


@dataclass(frozen=True)
class Row:
    """One candidate: evaluations a step, and the distance of its latents to DB-MPA's (root mean square)."""

    candidate: str
    evaluations: float
    distance: Figure
    median: float


def compare(pipe: DiffusionPipeline, options: Options, steps: int, eta: float) -> list[Row]:
    """All candidates at one setting, by evaluations and distance."""
    chosen = candidates(options.preference)
    if unknown := set(options.only) - set(chosen):
        raise ValueError(f"no candidate is called {', '.join(unknown)}; there are {', '.join(chosen)}")
    knob = attach(pipe, SHIPPED, options.preference, REFERENCE)
    wanted = pictures(options.prompts, options.seeds, start=100)
    reference = draw_latents(pipe, wanted, steps=steps, eta=eta).latents
    rows = []
    for name, blender in chosen.items():
        if options.only and name not in options.only:
            continue
        knob._hook.blender = blender
        drawn = draw_latents(pipe, wanted, steps=steps, eta=eta)
        distances = rms_distance(drawn.latents, reference, options.seeds)
        rows.append(Row(name, drawn.evaluations, figure(distances), float(distances.median())))
    knob.detach()
    return sorted(rows, key=lambda row: (round(row.evaluations, 3), row.distance.mean))


def table(rows: list[Row], title: str) -> Table:
    """A line a candidate; a star marks those that nothing as cheap comes closer than (the Pareto front)."""
    made = Table(title=title)
    for column, side in (("candidate", "left"), ("evaluations", "right"), ("distance", "right"), ("median", "right")):
        made.add_column(column, justify=side)  # pyright: ignore[reportArgumentType] (rich wants a literal)
    closest = float("inf")
    for row in rows:
        star = " *" if row.distance.mean < closest else ""
        closest = min(closest, row.distance.mean)
        made.add_row(row.candidate + star, f"{row.evaluations:.2f}", str(row.distance), f"{row.median:.3f}")
    return made


def main(
    options: Annotated[Options, tyro.conf.OmitArgPrefixes] = Options(),
    json_file: JsonFile = None,
) -> None:
    """Prints evaluations a step and the distance to DB-MPA's latents of the same noise, for every candidate.

    Args:
        options: What is drawn.
    """
    torch.set_num_threads(options.threads)
    console, started, pipe = Console(), time.perf_counter(), open_pipeline(mini.MODEL)
    settings: list[dict[str, Any]] = []
    for steps, eta in ((steps, eta) for steps in options.steps for eta in options.etas):
        rows = compare(pipe, options, steps, eta)
        title = f"w = {options.weight:g}, lambda = {options.kl_scale:g}, {steps} steps, eta = {eta:g}"
        console.print(table(rows, title))
        settings.append({"steps": steps, "eta": eta, "rows": [asdict(row) for row in rows]})
    seconds = time.perf_counter() - started
    console.print(f"{seconds:.0f} s")
    write_record(json_file, {"options": asdict(options), "seconds": seconds, "settings": settings})


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
