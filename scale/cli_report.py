"""The command `dblend report`: the tables and figures of one or more sweeps."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional


@dataclass(frozen=True)
class Report:
    """Tables with intervals and figures of what `dblend sweep` has made: Markdown, CSV and PNG files."""

    runs: Positional[tuple[Path, ...]] = ()
    """Folders of runs; several of the same rewards make one report."""
    out: Path | None = None
    """Folder of the report; RUN/report of the first run if not given."""
    paper: bool = False
    """Print the paper's published numbers beside ours."""
    json: bool = False
    """Print everything as JSON."""

    def run(self) -> None:
        if not self.runs:
            raise ValueError("give the folder of a run, e.g. dblend report out/sweep")
        from scale.experiment.report import write_report

        found = write_report(self.runs, self.out or self.runs[0] / "report", beside_paper=self.paper)
        print(json.dumps(found, indent=1, allow_nan=False) if self.json else _summary(found))


def _summary(found: dict[str, Any]) -> str:
    """The claims, those that did not reproduce one by one; what was left out, and where the files lie."""
    rows = found["tables"].get("claims", ())
    lines = [
        f"{row['verdict']:>16}  {row['claim']}, {row['where']}: {row['measured']} = {_interval(row)}, "
        f"goal {row['goal']}"
        for row in rows
        if row["verdict"] != "reproduced"
    ]
    places = Counter(row["claim"] for row in rows)
    for claim, count in Counter(row["claim"] for row in rows if row["verdict"] == "reproduced").items():
        lines.append(f"{'reproduced':>16}  {claim}, at {count} of {places[claim]}")
    lines += [f"left out: {name} ({why})" for name, why in found["left_out"].items()]
    if found["missing"]:
        lines.append(f"unfinished: {found['missing']} images have yet to be made")
    return "\n".join([*lines, f"written: {found['out']}/report.md, and its tables and figures"])


def _interval(row: dict[str, Any]) -> str:
    low, high = (row[name] for name in ("value low", "value high"))
    return f"{row['value']:.3g}" + ("" if low is None or high is None else f" [{low:.3g}, {high:.3g}]")
