"""GenEval-style checks of a run on the small world: the share of images that pass each tag, by cell."""

from pathlib import Path

import numpy as np
import pandas as pd

from scale.experiment.report.bootstrap import Estimate, wilson
from scale.experiment.report.frame import Frame, Results, read_image
from scale.experiment.report.means import cells
from scale.mini import geneval, world


def check_table(results: Results) -> Frame | str:
    """One row a cell (base once): the share of images that pass each tag, with Wilson's 95 % interval.

    Wilson's interval takes images as independent; where a prompt has several seeds it is somewhat too short. Says why
    there is no table where the run is not of the small world.
    """
    if results.model is not None:
        return "the checks are of the small world alone"
    try:
        for prompt in results.frame["prompt"].unique():
            world.parse(prompt)
    except ValueError:
        return "the checks take captions of the small world alone"
    files = results.frame.drop_duplicates("path").set_index("path")["prompt"]
    files = files[[Path(path).is_file() for path in files.index]]
    if files.empty:
        return "the checks take the run's images, which are not there"
    passed = geneval.check((np.asarray(read_image(path)) for path in files.index), files.tolist()).set_axis(
        files.index, axis=0
    )
    rows, based = [], False
    for cell, part in cells(results):
        is_base = results.method(str(cell["label"])) == "base"
        seen = passed.reindex(part["path"]).dropna(how="all")
        if (is_base and based) or seen.empty:
            continue
        based |= is_base
        row = dict(cell) | ({"preference": "", "kl_scale": 0.0} if is_base else {}) | {"images": len(seen)}
        rows.append(row | {tag: _share(seen[tag]) for tag in geneval.TAGS})
    return pd.DataFrame(rows)


def _share(answers: Frame) -> Estimate | None:
    known = answers.dropna()
    if known.empty:
        return None
    low, high = wilson(int(known.sum()), len(known))
    return Estimate(float(known.mean()), low, high, len(known), len(known), "images")
