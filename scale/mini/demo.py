"""The image half of `dblend demo`: two rewards in conflict, and every blend between their experts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from dbtheory.files import write_atomically
from dbtheory.preference import Preference
from scale import mini
from scale.attachment import attach
from scale.mini import world
from scale.mini.card import statistics
from scale.pipeline import Picture, draw, open_pipeline

FIRST, SECOND = "colorfulness", "jpeg"
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
PROMPTS, SHOWN, STEPS = 64, 8, 20


def run(
    out: Path, *, seed: int = 0, prompts: int = PROMPTS, advance: Callable[[int], object] = lambda k: None
) -> dict[str, Any]:
    """The base model and DB-MPA at every w (the weight of colorfulness) on held-out prompts, one seed each.

    Writes `pareto.png` and `contact-sheet.png` into `out`; returns a JSON-able dict whose rows hold mean, standard
    error and standard deviation of every reward. `advance(k)` is called after every k pictures.
    """
    pipe = open_pipeline(mini.MODEL)
    pictures = [Picture(p, i, seed * 1000 + i) for i, p in enumerate(world.held_out_prompts()[:prompts])]

    def images() -> Tensor:
        options = {"steps": STEPS, "guidance": mini.GUIDANCE, "advance": advance}
        return torch.cat([batch for _, batch in draw(pipe, pictures, **options)])

    made = {"base": images()}
    knob = attach(pipe, {name: mini.ADAPTERS / name for name in (FIRST, SECOND)}, Preference({FIRST: 1.0, SECOND: 0.0}))
    for w in WEIGHTS:
        knob.preference = Preference({FIRST: w, SECOND: 1 - w})
        made[f"w = {w:g}"] = images()
    knob.detach()

    captions = [picture.prompt for picture in pictures]
    rows = [{"model": label, **statistics(batch, captions)} for label, batch in made.items()]
    write_atomically(out / "pareto.png", lambda path: _pareto(rows).savefig(path, dpi=150))
    sheet = {label: batch for label, batch in made.items() if label != "base"}
    write_atomically(out / "contact-sheet.png", lambda path: _sheet(sheet, captions[:SHOWN]).savefig(path, dpi=150))
    return {
        "rewards": [FIRST, SECOND], "prompts": prompts, "seed": seed, "steps": STEPS, "guidance": mini.GUIDANCE,
        "rows": rows, "figures": [str(out / "pareto.png"), str(out / "contact-sheet.png")],
    }  # fmt: skip


def _pareto(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean rewards with standard errors: the blends as a curve, the base model apart."""
    figure = _figure(6.4, 4.8)
    axis = figure.subplots()
    base, blends = rows[0], rows[1:]
    points = [[row[name][0] for row in blends] for name in (FIRST, SECOND)]
    errors = [[row[name][1] for row in blends] for name in (FIRST, SECOND)]
    axis.errorbar(*points, xerr=errors[0], yerr=errors[1], fmt="o-", color="#0072B2", capsize=2, label="DB-MPA")
    axis.errorbar(
        *([base[name][0]] for name in (FIRST, SECOND)), xerr=base[FIRST][1], yerr=base[SECOND][1],
        fmt="s", color="#4d4d4d", capsize=2, label="base model",
    )  # fmt: skip
    for row, x, y in zip(blends, *points, strict=True):
        axis.annotate(row["model"], (x, y), textcoords="offset points", xytext=(7, 6), fontsize=9, color="#333333")
    axis.set(xlabel="colorfulness (M / 100)", ylabel="JPEG compressibility (minus kB)")
    axis.set_title("w colorfulness + (1 - w) compressibility: means and standard errors", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(0.14)
    axis.legend(frameon=False)
    return figure


def _sheet(made: Mapping[str, Tensor], prompts: Sequence[str]) -> Figure:
    """A row a prompt, a column a preference; every row has one seed."""
    figure = _figure(1.35 * len(made) + 1.3, 1.4 * len(prompts) + 0.5)
    axes = figure.subplots(len(prompts), len(made), squeeze=False)
    for line, prompt, i in zip(axes, prompts, range(len(prompts)), strict=True):
        line[0].set_ylabel(prompt.replace(" and ", "\nand "), rotation=0, ha="right", va="center", fontsize=8)
        for axis, (label, images) in zip(line, made.items(), strict=True):
            axis.imshow(images[i].permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if i == 0:
                axis.set_title(label, fontsize=10)
    figure.suptitle("w: weight of colorfulness (compressibility has 1 - w)", fontsize=10)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
