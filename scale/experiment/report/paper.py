"""The paper's published numbers (`paper.yaml`), and ours beside them."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from scale.experiment.report.bootstrap import Estimate, estimate
from scale.experiment.report.claims import uniform_preferences
from scale.experiment.report.frame import Frame, Results, pair, select
from scale.experiment.report.means import base_of, difference

DATA = Path(__file__).with_name("paper.yaml")
NAMES = {
    "base": "SD", "morl": "MORL", "mpa": "DB-MPA", "mpa-ls": "DB-MPA-LS", "rs-factors": "RS", "code": "CoDe",
    "rgg": "RGG",
}  # fmt: skip


@cache
def published() -> Mapping[str, Any]:
    """`paper.yaml`: `tables`, each with its source, and `claim`, the ratios that Section 5.1 prints."""
    return yaml.safe_load(DATA.read_text(encoding="utf-8"))


def weighted_gain(table: Mapping[str, Any], w: float, method: str) -> float | None:
    """The gain of a method's weighted reward over SD in a table of two rewards; of the mean reward in Table 6.

    None where a number is missing.
    """
    cell = table["rows"][w][method]
    if any(value is None for value in cell):
        return None
    weights = (w, 1 - w) if table["table"] != 6 else (1 / len(cell),) * len(cell)
    base = table["base"] if table["values"] == "rewards" else [0.0] * len(cell)
    return float(sum(weight * (value - zero) for weight, value, zero in zip(weights, cell, base, strict=True)))


def chosen(results: Results) -> list[Mapping[str, Any]]:
    """The tables that the runs' configs name, for other tables may have other rewards; all, where they name none."""
    named = {name for run in results.runs for name in run["paper"]}
    return [table for table in published()["tables"] if not named or f"table{table['table']}" in named]


def comparison(results: Results) -> Frame:
    """A row for each cell that the paper prints: its numbers, its weighted gain over SD, and ours if there is one."""
    rows = []
    for table in chosen(results):
        for w, line in _rows(table):
            for method, cell in line.items():
                row = {"paper": f"Table {table['table']}, {table['model']}", "at": _place(table, w)}
                numbers = ", ".join("missing" if value is None else f"{value:g}" for value in cell)
                row |= {"method": NAMES[method], "prints": table["values"], "printed": numbers}
                row |= {"paper's gain": weighted_gain(table, w, method)}
                rows.append(row | _ours(results, table, w, method))
    return pd.DataFrame(rows)


def ratio_table(results: Results) -> Frame:
    """By how much DB-MPA's weighted gain at w = 0.5 exceeds that of RS, CoDe and RGG: printed, recomputed, ours."""
    first = published()["tables"][0]
    rows = []
    for method, printed in published()["claim"]["printed"].items():
        ours, theirs = weighted_gain(first, 0.5, "mpa"), weighted_gain(first, 0.5, method)
        assert ours is not None
        assert theirs
        row = {"over": NAMES[method], "printed": printed, "recomputed from Table 1": ours / theirs}
        rows.append(row | {"ours": _ratio(results, method)})
    return pd.DataFrame(rows)


def label_of_models(results: Results) -> str:
    """What is compared with what, in words."""
    rewards = ", ".join(results.rewards)
    if results.model is None:
        return (
            f"Ours: the small world that ships with the package, rewards {rewards}. The paper: Stable Diffusion 1.5 "
            "and XL with rewards of their own. Different models, rewards and prompts: compare signs and order, "
            "not sizes."
        )
    return f"Ours: {results.model}, rewards {rewards}, adapters of our own training; each row names the paper's model."


def notes(tables: Sequence[Mapping[str, Any]]) -> str:
    """What is to be known of the tables' printed numbers."""
    return " ".join(f"Table {table['table']}: {table['note']}." for table in tables)


def time_table(results: Results) -> Frame:
    """Seconds an image of the paper's Table 1 and of ours, and both as multiples of the base model's.

    Ours are of each method's first label where at least two rewards have weight: one expert alone costs what base does.
    """
    seconds = published()["tables"][0]["seconds"]
    mixed = [name for name in results.preferences() if sum(weight > 0 for weight in results.weights(name)) > 1]
    rows = results.frame[results.frame["preference"].isin(mixed)]
    ours = {method: rows.loc[rows["label"].isin(results.labels(method)[:1]), "seconds"].mean() for method in seconds}
    return pd.DataFrame([
        {
            "method": NAMES[method], "paper": value, "paper / SD": value / seconds["base"],
            "ours": ours[method], "ours / base": ours[method] / ours["base"],
        }
        for method, value in seconds.items()
    ])  # fmt: skip


def _rows(table: Mapping[str, Any]) -> list[tuple[float, Mapping[str, Any]]]:
    """The weight of the first reward (in Table 6 the number of rewards), and the cells there by method."""
    return [(float(w), line) for w, line in (table["rows"] or {}).items()]


def _place(table: Mapping[str, Any], w: float) -> str:
    return f"{w:g} rewards" if table["table"] == 6 else f"w = {w:g}"


def _ours(results: Results, table: Mapping[str, Any], w: float, method: str) -> dict[str, Any]:
    """Our means and gain at the same preference, by the method's first label; empty where we have none."""
    labels = results.labels(method)
    if table["table"] == 6:
        preference = uniform_preferences(results).get(int(w))
    else:
        preference = f"w = {w:g}" if len(results.rewards) == 2 else None
    if not labels or preference is None:
        return {}
    part = select(results.frame, labels[0], preference, 1.0)
    both = pair(part, base_of(results, preference))
    if both.empty:
        return {}
    means = (part[f"reward.{name}"].mean() for name in results.rewards)
    return {"our rewards": ", ".join(f"{value:.3g}" for value in means), "our gain": difference(both)}


def _ratio(results: Results, method: str) -> Estimate | None:
    """DB-MPA's weighted gain over another method's at w = 0.5; None where either cannot be told from 0."""
    mine, other = results.labels("mpa"), results.labels(method)
    preference = "w = 0.5"
    if not mine or not other or preference not in results.preferences():
        return None
    cells = [select(results.frame, label, preference, 1.0) for label in (mine[0], other[0])]
    base = base_of(results, preference)
    joined = pair(*cells, base)
    if joined.empty:
        return None
    values, prompts = joined[[f"{k}.weighted" for k in range(3)]].to_numpy(float), joined["prompt"].tolist()
    if not estimate(values, prompts, lambda m: m[..., 1] - m[..., 2]).low > 0:
        return None
    return estimate(values, prompts, lambda m: (m[..., 0] - m[..., 2]) / (m[..., 1] - m[..., 2]))


def missing_numbers(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the paper's text lacks numbers, in words, from the data's nulls."""
    found = []
    for table in tables:
        rows = table["rows"]
        if rows is None:
            found.append(f"Table {table['table']}: every number")
            continue
        found += [
            f"Table {table['table']}, {_place(table, w)}: {NAMES[method]}, reward {1 + k}"
            for w, line in _rows(table) for method, cell in line.items()
            for k in np.flatnonzero([value is None for value in cell])
        ]  # fmt: skip
    return found
