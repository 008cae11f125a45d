"""The regime map as a figure: a heat map a method, and one that names the method to take in each cell."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure

from toys.regimes import winner
from toys.style import INK, MARKS, frame, new_figure

COLOURS = "cividis"
COLUMNS = 4
# what fits into a cell
SHORT = {"db": "MPA", "ls": "LS", "ls-iid": "LS\niid", "msdda": "MSD-\nDA", "piecewise": "piece-\nwise"}
SHORT |= {"quadratic": "quad-\nratic", "corrected": "cor-\nrected", "soup": "soup"}
Table = Sequence[Sequence[float | None]]


def regime_figure(regimes: Mapping[str, Any], labels: Mapping[str, str], title: str) -> Figure:
    """The map that `toys.regimes.regime_map` returns: rows are alpha, columns the angle between the rewards."""
    panels = [
        (layer, name, f"{_name(name, layer['kl_scale'], labels)}, λ = {layer['kl_scale']:g}")
        for layer in regimes["layers"]
        for name in layer["errors"]
        if name != "floor"
    ]
    rows = -(-(len(panels) + 1) // COLUMNS)
    figure = new_figure(3.3 * COLUMNS, 3.0 * rows + 0.6, title)
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    every = [e for layer in regimes["layers"] for t in layer["errors"].values() for r in t for e in r if e is not None]
    low, high = min(every), max(every)
    norm = LogNorm(low, high)
    for axis, (layer, name, panel) in zip(axes.flat, panels, strict=False):
        _heat(axis, layer["errors"][name], norm)
        _label(axis, regimes, panel)
    _winners(axes.flat[len(panels)], regimes["layers"][0]["errors"])
    _label(axes.flat[len(panels)], regimes, "cheapest that is as good as the best, λ = 1")
    for axis in axes.flat[len(panels) + 1 :]:
        axis.set_axis_off()
    bar = figure.colorbar(ScalarMappable(norm, COLOURS), ax=axes, shrink=0.6, aspect=30)
    bar.set_label("sliced W₂ to the exact target", fontsize=10, color=INK)
    ticks = [m * 10.0**k for k in range(-4, 3) for m in (1, 2, 5) if low <= m * 10.0**k <= high]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    return figure


def _heat(axis: Axes, table: Table, norm: LogNorm) -> None:
    values = [[float("nan") if error is None else error for error in row] for row in table]
    axis.imshow(values, cmap=COLOURS, norm=norm, origin="lower", aspect="auto")
    for row, line in enumerate(values):
        for column, error in enumerate(line):
            text = "–" if error != error else f"{error:.2f}"
            axis.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color=_ink(colormaps[COLOURS](float(norm(error)))),
            )


def _winners(axis: Axes, errors: Mapping[str, Table]) -> None:
    table = errors["floor"]
    names = [[winner(errors, row, column) for column in range(len(table[0]))] for row in range(len(table))]
    colours = [[to_rgb(MARKS[name].colour) for name in line] for line in names]
    axis.imshow(colours, origin="lower", aspect="auto")
    for row, line in enumerate(names):
        for column, name in enumerate(line):
            axis.text(column, row, SHORT[name], ha="center", va="center", fontsize=8, color=_ink(colours[row][column]))


def _name(method: str, kl_scale: float, labels: Mapping[str, str]) -> str:
    return ("DB-MPA" if kl_scale == 1 else "DB-KLA") if method == "db" else labels[method]


def _label(axis: Axes, regimes: Mapping[str, Any], title: str) -> None:
    alphas, angles = regimes["alphas"], regimes["angles"]
    axis.set_xticks(range(len(angles)), [f"{angle:g}°" for angle in angles])
    axis.set_yticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    axis.set_ylabel("α", fontsize=10, color=INK, rotation=0)
    axis.set_title(title, fontsize=10, color=INK)
    frame(axis)


def _ink(colour: Sequence[float]) -> str:
    """Black or white, whichever stands out."""
    red, green, blue = colour[:3]
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
