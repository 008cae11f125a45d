"""Hypervolume: how much of reward space the front of a method's means dominates."""

import moocore
import numpy as np
import pandas as pd
from jaxtyping import Float

from scale.experiment.report.bootstrap import Estimate, estimate
from scale.experiment.report.frame import IMAGE, Frame, Results, reward_columns, same_images, select


def hypervolume(
    points: Float[np.ndarray, "*draws p m"], reference: Float[np.ndarray, " m"]
) -> Float[np.ndarray, "*draws"]:
    """Volume that p points dominate above `reference`, every reward the larger the better (moocore, exact)."""
    flat = points.reshape(-1, *points.shape[-2:])
    ones = [moocore.hypervolume(front, ref=reference, maximise=True) for front in flat]
    return np.array(ones, dtype=float).reshape(points.shape[:-2])


def front_table(results: Results) -> Frame:
    """Each label's hypervolume, twice: of its own preferences and images, and of those that all labels share.

    Rewards are gains over the base model's image of the same prompt and seed, where there is one: prompts differ more
    than methods do. Only fronts at one KL scale, the one with most images, and of labels with two preferences or more;
    base is the origin. The reference point is the worst mean of any cell there, base included, in each reward; it
    stays where it is while the bootstrap resamples. More preferences make a larger front, so only the shared column
    compares methods.
    """
    rows = _over_base(at_one_scale(results), reward_columns(results.rewards))
    fronts = {label: select(rows, label) for label in results.labels()}
    curves = [label for label in results.labels() if results.method(label) != "base"]
    several = [label for label in curves if fronts[label]["preference"].nunique() > 1]
    if len(results.rewards) < 2 or not several:
        return pd.DataFrame()
    columns = reward_columns(results.rewards)
    reference = rows.groupby(["label", "preference"])[columns].mean().min().to_numpy(float)
    common = set.intersection(*(set(fronts[label]["preference"]) for label in several))
    shared = same_images([fronts[label][fronts[label]["preference"].isin(common)] for label in several])
    bases = {label: fronts[label] for label in results.labels("base")}
    table = []
    for label, part in [*zip(several, shared, strict=True), *bases.items()]:
        own = _volume(fronts[label], columns, reference)
        count = fronts[label]["preference"].nunique() if label in several else None
        row = {"label": label, "preferences": count, "hypervolume": own}
        table.append(row | {"shared preferences": len(common), "shared": _volume(part, columns, reference)})
    return pd.DataFrame(table).assign(reference=[", ".join(f"{v:.4g}" for v in reference)] * len(table))


def _over_base(rows: Frame, columns: list[str]) -> Frame:
    """The rows with gains over base in place of rewards; as they are where there is no base."""
    base = rows[rows["method"] == "base"].drop_duplicates(IMAGE).set_index(IMAGE)[columns]
    if base.empty:
        return rows
    both = rows.join(base.add_suffix(" of base"), on=IMAGE, how="inner")
    return both.assign(**{column: both[column] - both[f"{column} of base"] for column in columns})


def at_one_scale(results: Results) -> Frame:
    """Base, and the other rows of the KL scale that most images have."""
    rows = results.frame
    based = rows["method"] == "base"
    scales = rows.loc[~based, "kl_scale"].mode()
    return rows[based | np.isclose(rows["kl_scale"], scales.iloc[0])] if len(scales) else rows


def _volume(rows: Frame, columns: list[str], reference: np.ndarray) -> Estimate | None:
    """Of the means over the images that every preference of these rows has; None where there is no such image."""
    wide = rows.pivot_table(index=IMAGE, columns="preference", values=columns).dropna()
    if wide.empty:
        return None
    preferences = wide.columns.get_level_values("preference").unique()
    wide = wide[[(column, preference) for preference in preferences for column in columns]]

    def volume(means: np.ndarray) -> np.ndarray:
        return hypervolume(means.reshape(*means.shape[:-1], len(preferences), len(columns)), reference)

    prompts = wide.index.get_level_values("prompt").tolist()
    return estimate(wide.to_numpy(float), prompts, volume)
