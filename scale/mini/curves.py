"""The training curves of the family in one figure."""

from collections.abc import Mapping
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scale.mini.family import SINGLE

WINDOW = 5  # rounds of the moving mean


def draw_curves(training: Mapping[str, Mapping[str, Any]]) -> Figure:
    """By expert, its `training.json`: reward less the first rounds' (its own, in its own units) and KL by round."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    rewards, kls = figure.subplots(1, 2)
    for number, (name, facts) in enumerate(training.items()):
        history = facts["history"]
        style = {"lw": 1.8 if name in SINGLE else 1.0, "color": f"C{number % 10}", "ls": ("-", "--")[number // 10 % 2]}
        smooth = _moving([record["reward"] for record in history])
        rounds = range(1, len(history) + 1)
        rewards.plot(rounds, [value - smooth[0] for value in smooth], label=name, **style)
        kls.plot(rounds, [record["kl"] for record in history], **style)
    rewards.set(xlabel="round", ylabel="gain in the reward it is trained on", title=f"means of {WINDOW} rounds")
    kls.set(xlabel="round", ylabel="KL of a trajectory to the base model, nats", title="KL")
    for axis in (rewards, kls):
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*rewards.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    return figure


def _moving(values: list[float]) -> list[float]:
    """The mean of each value and those before it, `WINDOW` at most; the first full window stands for what precedes."""
    full = [sum(values[max(0, i - WINDOW + 1) : i + 1]) / min(i + 1, WINDOW) for i in range(len(values))]
    first = full[min(WINDOW, len(full)) - 1]
    return [first if i < WINDOW else value for i, value in enumerate(full)]
