"""Samples of every method side by side, over the exact density they should have: points on a plane, or bars."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dbtheory.law import Law
from toys.style import DENSITY, INK, frame, new_figure


@dataclass(frozen=True)
class Cloud:
    """Samples `(n, d)` with d = 1 or 2, the law whose density stands behind them, and what is written about them."""

    title: str
    note: str
    colour: str
    samples: Tensor
    law: Law


def cloud_figure(rows: Sequence[Sequence[Cloud]], title: str, *, shown: int = 1500) -> Figure:
    """One panel a cloud, on one scale; rows may be shorter than the longest."""
    columns = max(map(len, rows))
    figure = new_figure(2.45 * columns + 0.2, 2.95 * len(rows) + 0.5, title)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    low, high = _window([cloud.law for row in rows for cloud in row])
    for row, line in zip(rows, axes, strict=True):
        for axis in line[len(row) :]:
            axis.set_axis_off()
        for cloud, axis in zip(row, line, strict=False):
            draw = _bars if len(low) == 1 else _points
            draw(axis, cloud, low, high, shown)
            axis.set_title(cloud.title, fontsize=11, color=INK)
            axis.set_xlabel(cloud.note, fontsize=10, color=INK)
            frame(axis)
    return figure


def _points(axis: Axes, cloud: Cloud, low: Tensor, high: Tensor, shown: int) -> None:
    lines = [torch.linspace(float(a), float(b), 161, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    x, y = torch.meshgrid(*lines, indexing="xy")
    log_density = cloud.law.log_prob(torch.stack([x, y], dim=-1).reshape(-1, 2)).reshape(x.shape)
    # levels a factor 10 apart below the mode show where mass belongs, however little of it
    levels = (log_density.max() + torch.tensor([-6.9, -4.6, -2.3, 0.0])).tolist()
    axis.contourf(x.numpy(), y.numpy(), log_density.numpy(), levels=levels, colors=list(DENSITY))
    points = cloud.samples[:shown].cpu().numpy()
    axis.scatter(points[:, 0], points[:, 1], s=2.0, c=cloud.colour, alpha=0.45, linewidths=0, rasterized=True)
    axis.set(
        xlim=(lines[0][0].item(), lines[0][-1].item()),
        ylim=(lines[1][0].item(), lines[1][-1].item()),
        aspect="equal",
        xticks=[],
        yticks=[],
    )


def _bars(axis: Axes, cloud: Cloud, low: Tensor, high: Tensor, _shown: int) -> None:
    line = torch.linspace(float(low), float(high), 401, dtype=torch.float64)
    density = cloud.law.log_prob(line.unsqueeze(-1)).exp()
    edges = line[::5]
    counts, _ = torch.histogram(cloud.samples[:, 0].cpu(), edges)
    heights = counts / (len(cloud.samples) * edges.diff())  # of all samples, also those outside
    axis.fill_between(line.numpy(), density.numpy(), color=DENSITY[-1], linewidth=0)
    axis.stairs(heights.numpy(), edges.numpy(), color=cloud.colour, linewidth=1.3)
    axis.set(xlim=(float(low), float(high)), ylim=(0, 1.35 * float(density.max())), yticks=[])


def _window(laws: Sequence[Law]) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """A square box that holds nearly all of every law's draws."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([law.sample(2000, generator=generator) for law in laws])
    low, high = draws.quantile(0.0005, dim=0), draws.quantile(0.9995, dim=0)
    centre, reach = 0.5 * (low + high), 0.58 * (high - low).max()
    return centre - reach, centre + reach
