"""How the figures look: one colour and mark a method, safe for the colour-blind (Okabe and Ito)."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scale.experiment.report.bootstrap import Estimate

BASE = "#4d4d4d"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#B8A500")
MARKS = ("o", "^", "D", "v", "P", "X", "s", "*")
NAMES = {
    "base": "base model", "mpa": "DB-MPA", "mpa-ls": "DB-MPA-LS", "mpa-held": "DB-MPA-held", "kla": "DB-KLA",
    "morl": "MORL (retrained)", "rs": "RS (weights)", "rs-factors": "RS (LoRA factors)", "code": "CoDe", "rgg": "RGG",
    "msdda": "MSDDA", "interp": "interpolated",
}  # fmt: skip


def make_figure(width: float, height: float) -> Figure:
    """A figure that needs no display, sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def look(labels: Sequence[str], label: str) -> dict[str, str]:
    """Colour and mark of a label, by its place among all labels of the report."""
    place = list(labels).index(label)
    # a second round has the colours in another order, so that no two labels look alike
    mark = MARKS[(place + place // len(COLOURS)) % len(MARKS)]
    return {"color": COLOURS[place % len(COLOURS)], "marker": mark}


def curve(axis: Axes, x: Sequence[float], estimates: Sequence[Estimate], **style: object) -> None:
    """Means with their intervals, joined."""
    values = np.array([e.value for e in estimates])
    reach = np.abs(np.array([[e.value - e.low, e.high - e.value] for e in estimates]).T)
    axis.errorbar(x, values, yerr=np.nan_to_num(reach), capsize=2, linewidth=1.4, markersize=5, **style)  # pyright: ignore[reportArgumentType]


def finish(axis: Axes, title: str, **labels: str) -> None:
    """Labels, a legend, no box."""
    axis.set(**labels)
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(0.08)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)
