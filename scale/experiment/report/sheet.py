"""The contact sheet: one prompt and one seed a block, a row a method, a column a preference or a lambda."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from scale.experiment.report.frame import Frame, Results, read_image, select
from scale.experiment.report.front import at_one_scale
from scale.experiment.report.style import make_figure

PROMPTS, COLUMNS, PIXELS = 3, 11, 160


def sheet(results: Results) -> Figure | str:
    """Images of the first prompts that most methods have, at their first seed.

    Columns are preferences, evenly thinned to 11; where all images have one preference, they are lambdas. The first
    column is the base model's image. A place is empty where a method has no such image.
    """
    by_lambda = len(results.preferences()) == 1
    rows = results.frame if by_lambda else at_one_scale(results)
    key = "kl_scale" if by_lambda else "preference"
    moving = rows[rows["method"] != "base"]
    columns = (
        sorted(moving[key].unique()) if by_lambda else [n for n in results.preferences() if (rows[key] == n).any()]
    )
    columns = (
        [columns[k] for k in np.unique(np.linspace(0, len(columns) - 1, COLUMNS).round().astype(int))]
        if columns
        else []
    )
    labels = [label for label in results.labels() if results.method(label) != "base" and label in set(moving["label"])]
    shown = _chosen(rows)
    if not shown or not labels:
        return "the sheet takes images of a method with a preference, and their files"
    titles = ["base", *(f"lambda {c:g}" if by_lambda else str(c) for c in columns)]
    figure = make_figure(1.05 * len(titles) + 1.3, (1.08 * len(labels) + 0.35) * len(shown) + 0.2)
    blocks = figure.subfigures(len(shown), 1, squeeze=False)[:, 0]
    for block, (prompt, seed) in zip(blocks, shown, strict=True):
        block.suptitle(f"{prompt!r}, seed {seed}", fontsize=9)
        axes = block.subplots(len(labels), len(titles), squeeze=False)
        images = rows[(rows["prompt"] == prompt) & (rows["seed"] == seed)]
        base = images[images["method"] == "base"]
        for place, (line, label) in enumerate(zip(axes, labels, strict=True)):
            line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
            part = select(images, label)
            cells = [base, *(part[part[key] == column] for column in columns)]
            for axis, cell, title in zip(line, cells, titles, strict=True):
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
                if place == 0:
                    axis.set_title(title, fontsize=8)
                if (pixels := _pixels(cell)) is not None:
                    axis.imshow(pixels, interpolation="nearest")
    return figure


def _chosen(rows: Frame) -> list[tuple[str, int]]:
    """The (prompt, seed) pairs that most cells have; in the order of prompts among equals, one a prompt."""
    files = rows[[Path(path).is_file() for path in rows["path"]]]
    counts = files.groupby(["prompt", "seed"], sort=False).size().sort_values(ascending=False, kind="stable")
    chosen = {str(prompt): int(seed) for prompt, seed in reversed(counts.index.tolist())}
    order = list(dict.fromkeys(str(prompt) for prompt, _ in counts.index))
    return [(prompt, chosen[prompt]) for prompt in order[:PROMPTS]]


def _pixels(cell: Frame) -> np.ndarray | None:
    """The first image of a cell, reduced to at most 160 pixels; None where there is none."""
    if cell.empty or not Path(cell["path"].iloc[0]).is_file():
        return None
    picture = read_image(cell["path"].iloc[0])
    picture.thumbnail((PIXELS, PIXELS))
    return np.asarray(picture)
