"""Means with intervals: rewards and costs of every cell, gains over the base model, shares of MORL's gain."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd

from scale.experiment.report.bootstrap import Estimate, Statistic, estimate
from scale.experiment.report.frame import CELL, COSTS, Frame, Results, pair, reward_columns, select


def cells(results: Results) -> Iterator[tuple[dict[str, object], Frame]]:
    """Every (label, preference, KL scale) and its rows: labels as they appear, weights and scales rising."""
    for label in results.labels():
        for preference in results.preferences():
            rows = select(results.frame, label, preference)
            for kl_scale, part in rows.groupby("kl_scale", sort=True):
                yield dict(zip(CELL, (label, preference, kl_scale), strict=True)), part


def mean_table(results: Results) -> Frame:
    """One row a cell: number of images, mean of each reward and of the weighted one, and what an image has cost.

    Costs are means per image; `peak_memory` is the largest batch's, in bytes.
    """
    columns = [*reward_columns((*results.rewards, *results.also)), "weighted"]
    rows = []
    for cell, part in cells(results):
        row = dict(cell) | {"images": len(part), "prompts": part["prompt"].nunique()}
        row |= {_short(column): mean(part, column) for column in columns}
        row |= {cost: float(part[cost].mean()) for cost in COSTS if cost in part and cost != "peak_memory"}
        row |= {"peak_memory": float(part["peak_memory"].max())} if "peak_memory" in part else {}
        rows.append(row)
    return pd.DataFrame(rows)


def mean(rows: Frame, column: str) -> Estimate:
    """The mean of a column; images without a value are left out."""
    known = rows.dropna(subset=column)
    return estimate(known[[column]].to_numpy(float), known["prompt"].tolist())


def gain_table(results: Results) -> Frame:
    """One row a cell: how far each reward rose over the base model's image of the same prompt and seed."""
    columns = [*reward_columns(results.rewards), "weighted"]
    rows = []
    for cell, part in cells(results):
        base = base_of(results, str(cell["preference"]))
        if results.method(str(cell["label"])) == "base" or base.empty:
            continue
        both = pair(part, base, columns=columns)
        gains = {_short(column): difference(both, column) for column in columns}
        rows.append(dict(cell) | {"pairs": len(both)} | gains)
    return pd.DataFrame(rows)


def difference(both: Frame, column: str = "weighted") -> Estimate:
    """The mean of the first cell minus the second's, over a joined pair."""
    values = both[f"0.{column}"] - both[f"1.{column}"]
    return estimate(values.to_numpy(float)[:, None], both["prompt"].tolist())


def above_base(part: Frame, base: Frame, column: str) -> Estimate:
    """The base model's mean plus the paired gain over it, whose interval it has; a plain mean where base is lacking.

    Prompts differ more than methods do: this interval says how well methods can be told apart. It also puts methods
    that saw fewer prompts on the others' scale.
    """
    both = pair(part, base, columns=[column])
    if both.empty:
        return mean(part, column)
    level, gain = float(base[column].mean()), difference(both, column)
    return replace(gain, value=level + gain.value, low=level + gain.low, high=level + gain.high)


def share_table(results: Results) -> Frame:
    """Each method's gain in weighted reward as a share of MORL's, at the same preference and KL scale."""
    rows = []
    for cell, part in cells(results):
        label, preference = str(cell["label"]), str(cell["preference"])
        if results.method(label) in ("base", "morl"):
            continue
        for oracle in results.labels("morl"):
            expert = select(results.frame, oracle, preference, float(str(cell["kl_scale"])))
            share = gain_share(part, expert, base_of(results, preference))
            if share is not None:
                rows.append(dict(cell) | {"of": oracle, "share": share})
    return pd.DataFrame(rows)


def gain_share(part: Frame, whole: Frame, base: Frame) -> Estimate | None:
    """The gain of `part` over base as a share of that of `whole`, over the images that all three have.

    None without common images, or where the gain of `whole` cannot be told from 0, so that a share has no meaning.
    """
    if part.empty or whole.empty or base.empty:
        return None
    three = pair(part, whole, base)
    prompts = three["prompt"].tolist()
    values = three[["0.weighted", "1.weighted", "2.weighted"]].to_numpy(float)
    if not len(values) or not estimate(values, prompts, lambda m: m[..., 1] - m[..., 2]).low > 0:
        return None
    return estimate(values, prompts, SHARE)


def _share(means: np.ndarray) -> np.ndarray:
    return (means[..., 0] - means[..., 2]) / (means[..., 1] - means[..., 2])


SHARE: Statistic = _share


def base_of(results: Results, preference: str) -> Frame:
    """The base model's rows, weighted by a preference."""
    labels = results.labels("base")
    return select(results.frame, labels[0], preference) if labels else results.frame.iloc[:0]


def _short(column: str) -> str:
    return column.removeprefix("reward.")
