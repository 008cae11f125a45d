"""One look for all figures: colours that colour-blind readers can tell apart, and how each method is drawn.

A hue is a family of methods, a line style a member of it; no two share a marker. The palette is Okabe and Ito's.
"""

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK = "#333333"
FRAME = "#bbbbbb"
DENSITY = ("#eeeeee", "#dcdcdc", "#c4c4c4")


@dataclass(frozen=True)
class Mark:
    """How a method's curve is drawn."""

    colour: str
    line: str
    marker: str


MARKS = {
    "floor": Mark("#999999", "-", ""),
    "exact": Mark("#4d4d4d", "--", ""),
    "db": Mark("#0072B2", "-", "o"),
    "ls": Mark("#56B4E9", "-", "s"),
    "ls-iid": Mark("#56B4E9", ":", "x"),
    "msdda": Mark("#CC79A7", "-", "^"),
    "piecewise": Mark("#E69F00", ":", "+"),
    "quadratic": Mark("#E69F00", "-", "D"),
    "corrected": Mark("#D55E00", "-", "*"),
    "corrected-quadratic": Mark("#D55E00", ":", "p"),
    "network-db": Mark("#009E73", ":", "1"),
    "soup": Mark("#009E73", "-", "v"),
}


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure, in inches, that needs no display; `save` it by `toys.figures.save`."""
    # padding keeps the note below one panel off the title of the next
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.08, hspace=0.06))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, color=INK)
    return figure


def frame(axis: Axes) -> None:
    """Quiet spines and small, dark tick labels."""
    axis.tick_params(labelsize=9, color=FRAME, labelcolor=INK)
    for spine in axis.spines.values():
        spine.set_color(FRAME)
