"""DB-KLA beside experts that were trained for each lambda (paper, Fig. 6b)."""

from itertools import product

import pandas as pd

from scale.experiment.report.frame import Frame, Results, pair, select
from scale.experiment.report.means import difference


def lambda_table(results: Results) -> Frame:
    """DB-KLA's weighted reward minus that of the expert of the same lambda, image by image; a row a lambda."""
    rows = []
    for label, expert in product(results.labels("kla"), results.labels("morl")):
        for preference in results.preferences():
            for scale, part in select(results.frame, expert, preference).groupby("kl_scale"):
                both = pair(select(results.frame, label, preference, float(str(scale))), part)
                if len(both):
                    cell = {"label": label, "expert": expert, "preference": preference, "kl_scale": scale}
                    rows.append(cell | {"pairs": len(both), "difference": difference(both)})
    return pd.DataFrame(rows)
