"""Tables as Markdown, CSV and JSON, and the page that holds them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dbtheory.files import write_atomically
from scale.experiment.report.bootstrap import Estimate
from scale.experiment.report.frame import Frame

LONGEST = 120  # rows of a table on the page; the CSV has all


def markdown(table: Frame) -> str:
    """A table with estimates as `mean [low, high]`, cut to 120 rows."""
    if table.empty:
        return ""
    head = [_shown(column) for column in table.columns]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    rows = table.head(LONGEST).itertuples(index=False, name=None)
    lines += ["| " + " | ".join(_shown(value) for value in row) + " |" for row in rows]
    if len(table) > LONGEST:
        lines += ["", f"{len(table) - LONGEST} more rows are in the CSV file."]
    return "\n".join(lines)


def plain(table: Frame) -> Frame:
    """A table of numbers and words: an estimate takes three columns, itself and `low` and `high`."""
    columns: dict[str, Any] = {}
    for name in table.columns:
        values = table[name].tolist()
        if any(isinstance(value, Estimate) for value in values):
            for part, suffix in (("value", ""), ("low", " low"), ("high", " high")):
                columns[f"{name}{suffix}"] = [getattr(value, part, None) for value in values]
        else:
            columns[str(name)] = values
    return pd.DataFrame(columns)


def records(table: Frame) -> list[dict[str, Any]]:
    """Rows for JSON, where what is missing or infinite is null."""
    rows = plain(table).to_dict("records")
    return [{str(key): _known(value) for key, value in row.items()} for row in rows]


def write_table(path: Path, table: Frame) -> None:
    """The CSV file of a table."""
    write_atomically(path, lambda temporary: plain(table).to_csv(temporary, index=False))


def write_figure(path: Path, figure: Figure) -> None:
    """The PNG file of a figure."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=140))


def page(title: str, lead: Sequence[str], sections: Mapping[str, tuple[str, str]]) -> str:
    """The whole report: each section has a text and a table, or an image, under its heading."""
    parts = [f"# {title}", *lead]
    for heading, (text, body) in sections.items():
        parts += [f"## {heading}", text, body]
    return "\n\n".join(part for part in parts if part) + "\n"


def _shown(value: object) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, float | np.floating):
        return f"{value:.0f}" if abs(value) >= 1e5 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _known(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
