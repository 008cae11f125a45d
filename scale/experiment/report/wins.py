"""Win rates: how often one method's image has the higher weighted reward, prompt by prompt."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from scale.experiment.report.bootstrap import Estimate, estimate
from scale.experiment.report.frame import Frame, Results, pair, select
from scale.experiment.report.means import cells


def win_rate(both: Frame) -> Estimate:
    """Share of pairs of one prompt and seed that the first cell wins, ties counting half; prompts weigh alike.

    `both` is `frame.pair` of two cells. Each prompt's rate over its seeds is averaged over prompts.
    """
    wins = np.sign(both["0.weighted"] - both["1.weighted"]) / 2 + 0.5
    if both["prompt"].nunique() > 1:
        by_prompt = wins.groupby(both["prompt"]).mean()
        rate = estimate(by_prompt.to_numpy(float)[:, None], list(by_prompt.index))
        return Estimate(rate.value, rate.low, rate.high, len(both), rate.units, rate.unit)
    return estimate(wins.to_numpy(float)[:, None], both["prompt"].tolist())


def champion(results: Results) -> str | None:
    """The label whose wins are counted: the first of DB-MPA, else of the first method that is not base."""
    candidates = results.labels("mpa") or [name for name in results.labels() if results.method(name) != "base"]
    return candidates[0] if candidates else None


def win_table(results: Results, label: str | None = None, against: Sequence[str] = ()) -> Frame:
    """The rate at which `label` (DB-MPA if not given) wins over each other one, at the same preference and KL scale.

    The base model is met at every KL scale.
    """
    label = label or champion(results)
    rows = []
    for cell, part in cells(results):
        if cell["label"] != label:
            continue
        preference, kl_scale = str(cell["preference"]), float(str(cell["kl_scale"]))
        for other in against or [name for name in results.labels() if name != label]:
            scale = None if results.method(other) == "base" else kl_scale
            both = pair(part, select(results.frame, other, preference, scale))
            if len(both):
                rows.append(dict(cell) | {"against": other, "pairs": len(both), "wins": win_rate(both)})
    return pd.DataFrame(rows)
