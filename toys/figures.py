"""Figures of the toys, by matplotlib without a display: only `save` touches the disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from dbtheory.files import write_atomically
from dbtheory.law import Law

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#4d4d4d", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
INK = "#333333"


@dataclass(frozen=True)
class Panel:
    """One cloud of samples `(n, 2)`, and the short note that stands under it."""

    samples: Tensor
    note: str


def cloud_grid(
    rows: Mapping[str, tuple[Law, Sequence[Panel]]],
    columns: Sequence[str],
    title: str,
    *,
    half_width: float,
    shown: int = 1500,
) -> Figure:
    """Samples over the contours of their row's target: a row a label, a column a method, one scale."""
    figure = Figure(figsize=(2.25 * len(columns) + 0.7, 2.4 * len(rows) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, color=INK)
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    for line, (label, (target, panels)) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(label, fontsize=12, color=INK)
        for axis, panel, colour in zip(line, panels, COLOURS, strict=False):
            _draw(axis, target, panel, colour, half_width, shown)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column, fontsize=12, color=INK)
    return figure


def _draw(axis: Axes, target: Law, panel: Panel, colour: str, half_width: float, shown: int) -> None:
    line = torch.linspace(-half_width, half_width, 161, dtype=torch.float64)
    x, y = torch.meshgrid(line, line, indexing="xy")
    log_density = target.log_prob(torch.stack([x, y], dim=-1).reshape(-1, 2)).reshape(x.shape)
    # levels a factor 10 apart below the mode show where mass belongs, however little of it
    levels = (log_density.max() + torch.tensor([-6.9, -4.6, -2.3, 0.0])).tolist()
    axis.contourf(x.numpy(), y.numpy(), log_density.numpy(), levels=levels, colors=["#eeeeee", "#dcdcdc", "#c4c4c4"])
    points = panel.samples[:shown].cpu().numpy()
    axis.scatter(points[:, 0], points[:, 1], s=2.0, c=colour, alpha=0.45, linewidths=0, rasterized=True)
    axis.text(0.5, 0.025, panel.note, transform=axis.transAxes, ha="center", va="bottom", fontsize=10, color=INK)
    axis.set(xlim=(-half_width, half_width), ylim=(-half_width, half_width), aspect="equal", xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_color("#bbbbbb")


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as PNG, atomically: a reader sees the old file or the new one, never a part of it."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, facecolor="white"))
    return path
