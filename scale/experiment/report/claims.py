"""The paper's claims, each measured on a run, with a verdict: where DB loses stands first.

Verdicts come from one 95 % interval each, not corrected for their number. `reproduced` and `not reproduced` mean that
the whole interval lies on one side of the claim's threshold. The paper gives no thresholds for "close": ours are 90 %
of a gain, 80 % to 120 % for DB-KLA, and 80 % for stability.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from scale.experiment.report.bootstrap import Estimate, estimate
from scale.experiment.report.frame import Frame, Results, pair, select
from scale.experiment.report.means import base_of, difference, gain_share

CLOSE, SIMILAR = 0.9, (0.8, 1.2)
REPRODUCED, NOT, UNDECIDED = "reproduced", "not reproduced", "undecided"


@dataclass(frozen=True)
class Finding:
    """One claim at one place: what was measured, against the threshold `goal`, and the verdict."""

    claim: str
    where: str
    measured: str
    goal: str
    estimate: Estimate
    verdict: str

    def row(self) -> dict[str, object]:
        """For the table."""
        return {
            "verdict": self.verdict, "claim": self.claim, "where": self.where, "measured": self.measured,
            "value": self.estimate, "goal": self.goal, "prompts": self.estimate.units,
        }  # fmt: skip


def evaluate(results: Results) -> list[Finding]:
    """Every claim that the runs can speak to; `not reproduced` first, then `undecided`."""
    parts = (_beats, _near_morl, _single_near_blend, _stable, _follows_experts, _soups, _variants)
    found = [finding for part in parts for finding in part(results)]
    return sorted(found, key=lambda finding: (NOT, UNDECIDED, REPRODUCED).index(finding.verdict))


def claim_table(results: Results) -> Frame:
    """`evaluate` as a table."""
    return pd.DataFrame([finding.row() for finding in evaluate(results)])


def verdict(measured: Estimate, low: float, high: float = np.inf) -> str:
    """Whether the interval lies inside [low, high], wholly outside, or neither."""
    if measured.low > low and measured.high < high:
        return REPRODUCED
    return NOT if measured.high < low or measured.low > high else UNDECIDED


def _places(results: Results, method: str) -> Iterator[tuple[str, str, float]]:
    """(label, preference, KL scale) of a method's first label where at least two rewards have weight.

    The paper's claims are about that one; other labels of a method are variants of ours.
    """
    for label in results.labels(method)[:1]:
        for preference in results.preferences():
            if sum(weight > 0 for weight in results.weights(preference)) > 1:
                scales = select(results.frame, label, preference)["kl_scale"].unique()
                yield from ((label, preference, float(scale)) for scale in sorted(scales))


def _beats(results: Results) -> Iterator[Finding]:
    """DB-MPA has a higher weighted reward than RS, CoDe and RGG (paper, Section 5.1)."""
    for label, preference, scale in _places(results, "mpa"):
        ours = select(results.frame, label, preference, scale)
        for other in results.labels("rs", "rs-factors", "code", "rgg"):
            both = pair(ours, select(results.frame, other, preference, scale))
            if len(both):
                gap = difference(both)
                yield Finding(
                    f"DB-MPA above {results.method(other)}", _where(preference, scale), f"{label} - {other}", "> 0",
                    gap, verdict(gap, 0.0),
                )  # fmt: skip


def _near_morl(results: Results) -> Iterator[Finding]:
    """DB-MPA's front is very close to MORL's (paper, Section 5.1)."""
    yield from _shares(results, "mpa", "morl", "DB-MPA has MORL's gain")


def _single_near_blend(results: Results) -> Iterator[Finding]:
    """DB-MPA-LS is nearly identical to DB-MPA (paper, Section 5.1)."""
    yield from _shares(results, "mpa-ls", "mpa", "DB-MPA-LS has DB-MPA's gain")


def _shares(results: Results, method: str, whole: str, claim: str) -> Iterator[Finding]:
    for label, preference, scale in _places(results, method):
        ours = select(results.frame, label, preference, scale)
        for other in results.labels(whole)[:1]:
            share = gain_share(ours, select(results.frame, other, preference, scale), base_of(results, preference))
            if share is not None:
                yield Finding(
                    claim, _where(preference, scale), f"gain of {label} / gain of {other}", f"> {CLOSE}", share,
                    verdict(share, CLOSE),
                )  # fmt: skip


def _stable(results: Results) -> Iterator[Finding]:
    """DB's average gain stays as rewards are added, RS's falls (paper, Appendix C.4 and Table 6)."""
    uniform = uniform_preferences(results)
    if len(uniform) < 2:
        return
    first, last = uniform[min(uniform)], uniform[max(uniform)]
    where = f"{min(uniform)} to {max(uniform)} rewards, equal weights"
    for label in results.labels("mpa", "mpa-ls", "rs", "rs-factors"):
        method = results.method(label)
        ratio = _ratio_of_gains(results, label, first, last)
        if ratio is None:
            continue
        soup = method.startswith("rs")
        low, high = (-np.inf, SIMILAR[0]) if soup else (SIMILAR[0], np.inf)
        claim = f"the gain of {method} {'falls' if soup else 'is stable'} as rewards are added"
        goal = f"{'<' if soup else '>'} {SIMILAR[0]}"
        yield Finding(claim, where, f"{label}: last gain / first gain", goal, ratio, verdict(ratio, low, high))


def uniform_preferences(results: Results) -> dict[int, str]:
    """The preference that weighs k rewards alike and the others 0, by k >= 2; the first k rewards' where several do."""
    found: dict[int, str] = {}
    for preference in reversed(results.preferences()):
        active = [weight for weight in results.weights(preference) if weight > 0]
        if len(active) > 1 and np.ptp(active) < 1e-4:
            found.setdefault(len(active), preference)
    return found


def _ratio_of_gains(results: Results, label: str, first: str, last: str) -> Estimate | None:
    """Of the last preference's gain to the first's, in weighted reward, over the images that all have."""
    sides = [
        cell for preference in (last, first)
        for cell in (select(results.frame, label, preference), base_of(results, preference))
    ]  # fmt: skip
    if any(cell.empty or cell["kl_scale"].nunique() > 1 for cell in sides):
        return None
    joined = pair(*sides)
    prompts = joined["prompt"].tolist()
    values = joined[[f"{k}.weighted" for k in range(4)]].to_numpy(float)
    if not len(values) or not estimate(values, prompts, lambda m: m[..., 2] - m[..., 3]).low > 0:
        return None
    return estimate(values, prompts, lambda m: (m[..., 0] - m[..., 1]) / (m[..., 2] - m[..., 3]))


def _follows_experts(results: Results) -> Iterator[Finding]:
    """DB-KLA's reward follows that of models trained for each lambda (paper, Fig. 6b)."""
    for label, expert in product(results.labels("kla"), results.labels("morl")):
        for preference in results.preferences():
            experts = select(results.frame, expert, preference)
            for scale, part in experts.groupby("kl_scale"):
                if scale == 1:  # the two are one model there
                    continue
                ours = select(results.frame, label, preference, float(str(scale)))
                share = gain_share(ours, part, base_of(results, preference))
                if share is not None:
                    low, high = SIMILAR
                    yield Finding(
                        "DB-KLA follows the expert of each lambda", _where(preference, float(str(scale))),
                        f"gain of {label} / gain of {expert}", f"{low} to {high}", share, verdict(share, low, high),
                    )  # fmt: skip


def _soups(results: Results) -> Iterator[Finding]:
    """Averaging LoRA factors, as the reference does, loses against averaging their products (ours, not the paper's)."""
    for label, preference, scale in _places(results, "rs"):
        for other in results.labels("rs-factors"):
            ours = select(results.frame, label, preference, scale)
            both = pair(ours, select(results.frame, other, preference, scale))
            if len(both):
                gap = difference(both)
                yield Finding(
                    "a soup of weights beats a soup of LoRA factors (ours)", _where(preference, scale),
                    f"{label} - {other}", "> 0", gap, verdict(gap, 0.0),
                )  # fmt: skip


def _variants(results: Results) -> Iterator[Finding]:
    """What the methods that are ours add to DB-MPA: corrected, held, interpolated, another order (not the paper's)."""
    for label, preference, scale in _places(results, "mpa"):
        plain = select(results.frame, label, preference, scale)
        ours = [*results.labels("mpa")[1:], *results.labels("mpa-ls")[1:], *results.labels("mpa-held", "interp")]
        for other in ours:
            both = pair(select(results.frame, other, preference, scale), plain)
            if len(both):
                gap = difference(both)
                yield Finding(
                    f"{other} above DB-MPA (ours)", _where(preference, scale), f"{other} - {label}", "> 0", gap,
                    verdict(gap, 0.0),
                )  # fmt: skip


def _where(preference: str, scale: float) -> str:
    return preference if np.isclose(scale, 1) else f"{preference}, lambda {scale:g}"
