"""Runs the claims, and says of each row: claim, measured, bound, margin, verdict."""

from __future__ import annotations

import html
import importlib
import inspect
import math
import os
import pkgutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

import proofs_check
from proofs_check.claim import FAILS, REFUTED, Row

NO_CLAIMS = {"claim", "problems", "report"}
LEGEND = (
    "R = r(x_0)/alpha; F = E[e^R | x_t]; u = grad log F; gap = u - grad E[R | x_t]; x_t = a x_0 + s z; "
    "E, Var, sd given x_t"
)


@dataclass(frozen=True)
class Claim:
    """A claim that was run: its statement, where it stands in the paper, its rows, and the seconds it took."""

    name: str
    statement: str
    source: str
    rows: tuple[Row, ...]
    seconds: float


def names() -> tuple[str, ...]:
    """Every claim, by its module's name with hyphens."""
    modules = (module.name for module in pkgutil.iter_modules(proofs_check.__path__))
    return tuple(sorted(name.replace("_", "-") for name in modules if name not in NO_CLAIMS))


def run(name: str) -> Claim:
    """Check one claim in this process. What it raises becomes a failing row: a crash proves nothing."""
    module = importlib.import_module(f"proofs_check.{name.replace('-', '_')}")
    statement = " ".join((inspect.getdoc(module) or "").split("\n\n")[0].split())
    start = time.perf_counter()
    try:
        rows = tuple(module.check())
    except Exception as error:
        rows = (Row(f"raised {type(error).__name__}: {error}", float("nan"), 0.0),)
    return Claim(name, statement, module.SOURCE, rows, time.perf_counter() - start)


def run_all(
    chosen: Sequence[str], progress: Callable[[str], None] | None = None, workers: int | None = None
) -> list[Claim]:
    """Check these claims, one process a core; `progress(name)` is called as each is done.

    Raises:
        ValueError: a name that is no claim.
    """
    if unknown := [name for name in chosen if name not in names()]:
        raise ValueError(f"no claim named {', '.join(unknown)}; choose among {', '.join(names())}")
    workers = workers or min(os.cpu_count() or 1, len(chosen))
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_one_thread) as pool:
        running = {pool.submit(run, name): name for name in chosen}
        for future in as_completed(running):
            if progress is not None:
                progress(running[future])
        return [future.result() for future in running]


def passed(claims: Iterable[Claim]) -> bool:
    """Whether every claim that should hold does, and every counterexample refutes what it should."""
    return all(row.met for claim in claims for row in claim.rows)


def as_json(claims: Iterable[Claim]) -> dict[str, Any]:
    """`{"claims": [{name, statement, source, measured, bound, margin, verdict}, ...]}`, one entry a row.

    Numbers that JSON lacks are the strings "inf" and "nan", which `float` reads.
    """
    return {
        "claims": [
            {
                "name": f"{claim.name}: {row.what}",
                "statement": claim.statement,
                "source": claim.source,
                "measured": _number(row.measured),
                "bound": _number(row.bound),
                "sense": row.sense,
                "margin": _number(row.margin),
                "verdict": row.verdict,
            }
            for claim in claims
            for row in claim.rows
        ]
    }


def print_table(claims: Sequence[Claim], console: Console) -> None:
    """What holds or fails; then what the paper prints and does not hold; legend and count."""
    held = [(claim, row) for claim in claims for row in claim.rows if row.verdict != REFUTED]
    refuted = [(claim, row) for claim in claims for row in claim.rows if row.verdict == REFUTED]
    console.print(_table("Claims", held))
    if refuted:
        console.print(_table("Stated in the paper, but refuted here: counterexamples, computed just now", refuted))
    console.print(escape(LEGEND), highlight=False)
    failures = sum(not row.met for _, row in held)
    console.print(f"{len(held) - failures} rows hold, {failures} fail, {len(refuted)} refute what is printed")


def as_html(claims: Sequence[Claim]) -> str:
    """One page without scripts: each claim's statement and source over the table of its rows; the legend last."""
    sections = []
    for claim in claims:
        rows = "".join(
            f'<tr class="{row.verdict.split()[0].lower()}"><td>{html.escape(row.what)}</td>'
            f"<td>{row.measured:.4g}</td><td>{html.escape(_bound(row))}</td>"
            f"<td>{row.margin:.3g}</td><td>{row.verdict}</td></tr>"
            for row in claim.rows
        )
        sections.append(
            f"<h2>{claim.name}</h2><p>{html.escape(claim.statement)}</p>"
            f'<p class="source">{html.escape(claim.source)}; {claim.seconds:.1f} s</p><table><tr><th>claim</th>'
            f"<th>measured</th><th>bound</th><th>margin</th><th>verdict</th></tr>{rows}</table>"
        )
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>dblend verify</title>{_STYLE}{''.join(sections)}"
        f'<p class="source">{html.escape(LEGEND)}</p>'
    )


def _table(title: str, rows: Iterable[tuple[Claim, Row]]) -> Table:
    table = Table("claim", title=title, title_justify="left", expand=True)
    for column in ("measured", "bound", "margin", "verdict"):
        table.add_column(column, justify="right", no_wrap=True)
    last = None
    for claim, row in rows:
        if claim is not last:
            table.add_section()
            table.add_row(f"[bold]{claim.name}[/bold] ({escape(claim.source)}): {escape(claim.statement)}")
        last = claim
        style = "bold red" if row.verdict == FAILS else None
        what = Padding(escape(row.what), (0, 0, 0, 2))
        table.add_row(what, f"{row.measured:.3g}", _bound(row), f"{row.margin:.3g}", row.verdict, style=style)
    return table


def _one_thread() -> None:
    # processes share the cores already
    torch.set_num_threads(1)


def _bound(row: Row) -> str:
    return f"{row.sense} {row.bound:.3g}"


def _number(value: float | int) -> float | int | str:
    return value if math.isfinite(value) else str(float(value))


_STYLE = """<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100% } td, th { padding: .3rem .6rem; border-bottom: 1px solid #ddd }
td:not(:first-child), th:not(:first-child) { text-align: right; white-space: nowrap } th { text-align: left }
.fails { background: #fde0dc; font-weight: bold } .does { background: #fdf3d8 } .source { color: #666 }
</style>"""
