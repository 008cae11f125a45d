"""Error curves: the distance to the exact target along one variable at a time, a panel a sweep."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from toys.style import DENSITY, INK, MARKS, frame, new_figure

LOGARITHMIC = {"alpha", "steps"}
COLUMNS = 3


def error_figure(sweeps: Sequence[Mapping[str, Any]], labels: Mapping[str, str], title: str) -> Figure:
    """A panel a sweep (as `toys.sweeps.measure` returns them); what is below the floor is grey."""
    rows = -(-len(sweeps) // COLUMNS)
    figure = new_figure(4.2 * COLUMNS, 3.3 * rows + 1.2, title)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axis in axes[len(sweeps) :]:
        axis.set_axis_off()
    handles = {}
    for axis, sweep in zip(axes, sweeps, strict=False):
        handles |= _curves(axis, sweep)
    for axis in axes[::COLUMNS]:
        axis.set_ylabel("sliced W₂ to the exact target", fontsize=10, color=INK)
    order = [name for name in labels if name in handles]
    figure.legend(
        [handles[name] for name in order],
        [labels[name] for name in order],
        loc="outside lower center",
        ncols=4,
        fontsize=10,
        frameon=False,
        labelcolor=INK,
        handlelength=3,
    )
    return figure


def _curves(axis: Axes, sweep: Mapping[str, Any]) -> dict[str, Any]:
    """Draw one sweep; the artists by method, for the legend."""
    values, errors = sweep["values"], sweep["errors"]
    axis.set_yscale("log")
    if sweep["name"] in LOGARITHMIC:
        axis.set_xscale("log")
    handles = {}
    for name, curve in errors.items():
        mark, heights = MARKS[name], [float("nan") if error is None else error for error in curve]
        if name == "floor":
            handles[name] = axis.fill_between(values, heights, 1e-6, color=DENSITY[0], linewidth=0)
            continue
        (handles[name],) = axis.plot(
            values, heights, mark.line, marker=mark.marker, color=mark.colour, markersize=4.5, linewidth=1.4
        )
    heights = [error for curve in errors.values() for error in curve if error is not None]
    axis.set_ylim(0.7 * min(heights), 1.4 * max(heights))
    axis.set_xlabel(sweep["axis"], fontsize=10, color=INK)
    axis.set_title(sweep["fixed"], fontsize=10, color=INK)
    _ticks(axis, values, sweep["name"])
    frame(axis)
    return handles


def _ticks(axis: Axes, values: Sequence[float], name: str) -> None:
    """Marks where the measurements are, and 1-2-5 heights, as plain numbers."""
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    shown = values if len(values) <= 6 or name not in ("weight", "kl-scale") else values[::2]
    axis.xaxis.set_major_locator(FixedLocator(list(shown)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(plain)
    axis.yaxis.set_major_locator(FixedLocator([m * 10.0**k for k in range(-4, 3) for m in (1, 2, 5)]))
    axis.yaxis.set_major_formatter(plain)
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(True, color="#eeeeee", linewidth=0.8)
    axis.set_axisbelow(True)
