"""The tables of `benches.scale`, and the bounds that its figures are held to."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benches.core import Row
from benches.scale_contestants import PLAIN, REFERENCE, Task
from benches.scale_layer import OURS

COLUMNS = {
    "seconds": ("s / image", "{:.3f}"),
    "ratio": ("x plain", "{:.3f}"),
    "cpu_ratio": ("x, processor", "{:.3f}"),
    "forwards": ("forwards", "{:.0f}"),
    "rows": ("rows", "{:.0f}"),
    "overhead": ("overhead", "{:.2%}"),
    "parameters_mib": ("parameters MiB", "{:.1f}"),
    "held_mib": ("held MiB", "{:.1f}"),
    "peak_mib": ("peak MiB", "{:.0f}"),
    "synchronisations": ("syncs / step", "{:.1f}"),
}
Figures = Mapping[tuple[str, int], Mapping[str, float]]


def figures_table(figures: Figures, task: Task) -> Table:
    """A line for each contestant; forwards and rows are those of one call, which makes `batch` images."""
    there = [key for key in COLUMNS if any(key in found for found in figures.values())]
    table = Table(title=f"{task.model}, {task.steps} steps, {task.batch} images, {task.dtype} on {task.device}")
    table.add_column("method")
    table.add_column("m", justify="right")
    for key in there:
        table.add_column(COLUMNS[key][0], justify="right")
    for (method, m), found in figures.items():
        if not found:
            continue
        cells = [COLUMNS[key][1].format(found[key]) if key in found else "" for key in there]
        table.add_row(method, str(m), *cells)
    return table


def rows_table(rows: list[Row]) -> Table:
    """A line for each row, with its bound and whether it is met."""
    table = Table()
    for title in ("bench", "what", "value", "unit", "bound", ""):
        table.add_column(title, justify="right" if title == "value" else "left")
    for row in rows:
        bound = "" if row.bound is None else f"{row.sense} {row.bound:g}"
        verdict = {None: "", True: "met", False: "[red]NOT MET"}[row.met]
        table.add_row(row.bench, row.what, f"{row.value:.4g}", row.unit, bound, verdict)
    return table


def layers_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each layer: ours in microseconds, the others as multiples of it."""
    table = Table(title="one layer, rows of m adapters")
    for title in ("layer", "in -> out", "tokens", "rank", "m", f"{OURS}, us"):
        table.add_column(title, justify="left" if title in ("layer", "in -> out") else "right")
    others = [way for layer in layers[:1] for way in layer["seconds"] if way != OURS]
    for way in others:
        table.add_column(f"{way}, x", justify="right")
    for layer in layers:
        seconds, numbers = layer["seconds"], [str(layer[key]) for key in ("tokens", "rank", "adapters")]
        times = [f"{1e6 * seconds[OURS]:.0f}", *(f"{seconds[way] / seconds[OURS]:.2f}" for way in others)]
        table.add_row(layer["what"], f"{layer['inputs']} -> {layer['outputs']}", *numbers, *times)
    return table


def targets(figures: Figures, task: Task) -> list[Row]:
    """The figures that have a bound: time against plain, overhead, and memory with most adapters against one."""
    rows = []
    for (method, m), found in figures.items():
        what = f"{method}, m = {m}"
        bound = _time_bound(method, m, task)
        if "ratio" in found and bound is not None:
            made_from = {"seconds": found["seconds"], "cpu_ratio": found["cpu_ratio"]}
            rows.append(Row("time", what, found["ratio"], "x plain", made_from, bound, "<="))
        if "overhead" in found:
            rows.append(Row("overhead", what, found["overhead"], "of the evaluations", {}, 0.03, "<="))
    return rows + _memory(figures)


def _time_bound(method: str, m: int, task: Task) -> float | None:
    if method == "mpa-ls":
        return 1.03
    if method == "mpa" and task.batch == 1 and task.device != "cpu":
        return {2: 1.3, 4: 1.8}.get(m)
    return None


def _memory(figures: Figures) -> list[Row]:
    """Memory of many adapters over that of one, where both were observed; the reference's has no bound."""
    rows = []
    for (method, m), found in figures.items():
        one = figures.get(("mpa" if method == "mpa sequential" else method, 1), {})
        if m == 1 or method == PLAIN or not {"parameters_mib"} <= found.keys() & one.keys():
            continue
        bound = None if method == REFERENCE else 1.02
        for key in ("parameters_mib", "held_mib", "peak_mib"):
            peaks = bound if key != "peak_mib" or method != "mpa" else None  # m times the rows need their activations
            ratio, made_from = found[key] / one[key], {"one": one[key], "all": found[key]}
            what = f"{key.removesuffix('_mib')}: {method}, m = {m}"
            rows.append(Row("memory", what, ratio, "x m = 1", made_from, peaks, "<="))
    return rows
