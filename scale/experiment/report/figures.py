"""The figures of curves; each function gives a figure, or says why the run has none."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from scale.experiment.report.bootstrap import estimate
from scale.experiment.report.claims import uniform_preferences
from scale.experiment.report.frame import Frame, Results, pair, reward_columns, select
from scale.experiment.report.front import at_one_scale
from scale.experiment.report.means import above_base, base_of, difference
from scale.experiment.report.style import BASE, NAMES, curve, finish, look, make_figure

INTERVAL = "bars: 95 % intervals over prompts"


def pareto(results: Results) -> Figure | str:
    """Means of two rewards: each method a curve over its weights, base and single preferences points."""
    if len(results.rewards) != 2:
        return f"the Pareto figure takes two rewards, the run has {len(results.rewards)}"
    figure = make_figure(7.0, 5.0)
    axis = figure.subplots()
    rows = at_one_scale(results)
    columns = reward_columns(results.rewards)
    for label in results.labels():
        method = results.method(label)
        names = results.preferences()[:1] if method == "base" else results.preferences()
        cells = [(cell, base_of(results, name)) for name in names if len(cell := select(rows, label, name))]
        if not cells:
            continue
        first, second = ([above_base(cell, base, column) for cell, base in cells] for column in columns)
        reach = [[e.value - e.low for e in first], [e.high - e.value for e in first]]
        xerr = np.nan_to_num(np.abs(np.array(reach)))
        x = [e.value for e in first]
        curve(axis, x, second, xerr=xerr, elinewidth=0.8, **_style(results, label), **_dashed(method))
    title = f"means over the weight of {results.rewards[0]} (bars: 95 % intervals of the gain over base)"
    finish(axis, title, xlabel=results.rewards[0], ylabel=results.rewards[1])
    return figure


def weighted(results: Results) -> Figure | str:
    """Gain of the weighted reward over base: against the weight of the first of two rewards, else by preference."""
    if not results.labels("base"):
        return "the weighted figure shows gains over base, which the run lacks"
    two, names = len(results.rewards) == 2, results.preferences()
    place = {name: results.weights(name)[0] if two else float(k) for k, name in enumerate(names)}
    figure = make_figure(7.0, 4.5)
    axis = figure.subplots()
    rows = at_one_scale(results)
    for label in results.labels():
        if results.method(label) == "base":
            continue
        pairs = {
            place[name]: both for name in names if len(both := pair(select(rows, label, name), base_of(results, name)))
        }
        # between the preferences of more rewards there is nothing to join
        style = _style(results, label) | (_dashed(results.method(label)) if two else {"linestyle": "none"})
        curve(axis, list(pairs), [difference(both) for both in pairs.values()], **style)
    axis.axhline(0, color=BASE, linewidth=0.8)
    title = f"weighted reward, gain over the base model ({INTERVAL})"
    if two:
        first, second = results.rewards
        finish(axis, title, xlabel=f"w, the weight of {first}", ylabel=f"gain in w {first} + (1 - w) {second}")
    else:
        finish(axis, title, ylabel="gain in the preference's weighted reward")
        ticks = [_named(results, name).replace(" + ", "\n+ ") for name in names]
        axis.set_xticks(range(len(names)), ticks, fontsize=7)
    return figure


def over_lambda(results: Results) -> Figure | str:
    """Weighted reward against lambda, a panel a preference with several lambdas; experts trained for it beside."""
    scales = results.frame[results.frame["method"] != "base"].groupby("preference")["kl_scale"].nunique()
    preferences = [name for name in results.preferences() if scales.get(name, 0) > 1]
    if not preferences:
        return "the lambda figure takes several lambdas at one preference"
    figure = make_figure(5.5 * len(preferences[:3]), 4.2)
    for axis, preference in zip(figure.subplots(1, len(preferences[:3]), squeeze=False)[0], preferences, strict=False):
        base = base_of(results, preference)
        for label in results.labels():
            part = select(results.frame, label, preference)
            if results.method(label) == "base" or part["kl_scale"].nunique() < 2:
                continue
            points = {float(scale): above_base(rows, base, "weighted") for scale, rows in part.groupby("kl_scale")}
            if len(base) and results.method(label) != "morl" and 0.0 not in points:
                points = {0.0: above_base(base, base, "weighted"), **points}  # lambda 0 is the base model
            line = {"linestyle": "none"} if results.method(label) == "morl" else {}
            curve(axis, list(points), list(points.values()), **_style(results, label), **line)
        reward = _named(results, preference)
        finish(axis, f"{reward} (bars: 95 % intervals of the gain over base)", xlabel="lambda", ylabel=reward)
    return figure


def rewards_count(results: Results) -> Figure | str:
    """Gain over base, averaged over the rewards, against how many there are, all of one weight (paper, Fig. 7)."""
    uniform = uniform_preferences(results)
    if len(uniform) < 2 or not results.labels("base"):
        return "the rewards-count figure takes base, and equal weights on at least two numbers of rewards"
    figure = make_figure(6.0, 4.2)
    axis = figure.subplots()
    rows = at_one_scale(results)
    for label in results.labels():
        pairs = {
            float(count): both
            for count, name in sorted(uniform.items())
            if len(both := pair(select(rows, label, name), base_of(results, name)))
        }
        if results.method(label) != "base" and pairs:
            curve(axis, list(pairs), [difference(both) for both in pairs.values()], **_style(results, label))
    axis.axhline(0, color=BASE, linewidth=0.8)
    axis.set_xticks(sorted(uniform))
    finish(axis, f"average gain over the base model ({INTERVAL})", xlabel="rewards, equally weighted", ylabel="gain")
    return figure


def certificate(results: Results) -> Figure | str:
    """What a blend says of its own error, against what it loses to MORL; a point a cell, and the prompts' agreement.

    The certificate (MATH.md 8) is an integral along each image's path. The error of a law cannot be seen in single
    images, so the measured error is the weighted reward that retraining gains over the blend, by prompt and seed.
    """
    points = certificate_points(results)
    if points.empty:
        return "the certificate figure takes blends with certificates and MORL at the same preferences"
    figure = make_figure(11.0, 4.2)
    for axis, column in zip(figure.subplots(1, 2), ("certificate", "disagreement"), strict=True):
        for label, part in points.groupby("label", sort=False):
            part = part.sort_values(column)
            style = _style(results, str(label)) | {"linestyle": "none"}
            curve(axis, part[column].tolist(), part["loss"].tolist(), **style)
            for _, row in part.iterrows():
                axis.annotate(
                    row["preference"], (row[column], row["loss"].value), fontsize=7, color="#333333",
                    textcoords="offset points", xytext=(5, 4),
                )  # fmt: skip
        axis.axhline(0, color=BASE, linewidth=0.8)
        finish(axis, f"a point a preference ({INTERVAL})", xlabel=f"mean {column} of the blend",
               ylabel="weighted reward of MORL minus the blend's")  # fmt: skip
    return figure


def certificate_points(results: Results) -> Frame:
    """One row a cell that has certificates and MORL: their means, the loss to MORL, and how prompts agree.

    `agreement` is the correlation, over prompts, of the mean certificate with the mean loss.
    """
    rows = []
    expert = next(iter(results.labels("morl")), None)
    known = results.frame[results.frame["certificate"].notna()] if "certificate" in results.frame else results.frame[:0]
    for (label, preference, scale), part in known.groupby(["label", "preference", "kl_scale"], sort=False):
        columns = ["weighted", "certificate", "disagreement"]
        if expert is None or part["certificate"].abs().max() == 0:
            continue  # one expert alone: nothing to disagree on
        other = select(results.frame, expert, preference, scale).assign(certificate=0.0, disagreement=0.0)
        both = pair(other, part, columns=columns)
        if len(both):
            row = {"label": label, "preference": preference, "kl_scale": scale, "loss": difference(both)}
            row |= {column: float(both[f"1.{column}"].mean()) for column in columns[1:]}
            rows.append(row | {"agreement": _agreement(both)})
    return pd.DataFrame(rows)


def _agreement(both: Frame) -> object:
    """Pearson's correlation of prompt means, from means of products, so that the bootstrap takes it."""
    table: Frame = pd.DataFrame({"x": both["1.certificate"], "y": both["0.weighted"] - both["1.weighted"]})
    means = table.groupby(both["prompt"]).mean()
    if len(means) < 3:
        return None
    x, y = (means[name].to_numpy(float) - float(means[name].mean()) for name in ("x", "y"))

    def correlation(m: np.ndarray) -> np.ndarray:
        covariance = m[..., 2] - m[..., 0] * m[..., 1]
        return covariance / np.sqrt((m[..., 3] - m[..., 0] ** 2) * (m[..., 4] - m[..., 1] ** 2))

    return estimate(np.stack([x, y, x * y, x * x, y * y], 1), list(means.index), correlation)


def _dashed(method: str) -> dict[str, str]:
    """Retrained models are no blend."""
    return {"linestyle": "--"} if method == "morl" else {}


def _style(results: Results, label: str) -> dict[str, str]:
    method = results.method(label)
    name = NAMES.get(method, method) if label == method else label
    if method == "base":
        return {"color": BASE, "marker": "s", "label": name}
    labels = [other for other in results.labels() if results.method(other) != "base"]
    return look(labels, label) | {"label": name}


def _named(results: Results, preference: str) -> str:
    """The reward that a preference weighs, in words."""
    terms = zip(results.weights(preference), results.rewards, strict=True)
    return " + ".join(name if weight == 1 else f"{weight:.3g} {name}" for weight, name in terms if weight)
