"""With one more expert per edge of the preference simplex, aligned at its middle, quadratic interpolation is one order
more accurate than DB, which is linear interpolation of the experts: its error is of order 3 in 1/alpha where DB's is
of order 2, in w, in lambda and in both for three rewards, and zero at the nodes. The paper has no such method.

The errors are those of the blended scores at points of random mixtures. As a negative control, midpoints aligned
elsewhere than at the middle spoil the order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import torch

from dbtheory import ExactExperts, MeanBlend, Preference, tilt
from dbtheory.blend import Blender, Step
from dbtheory.blend_error import combined_reward
from dbtheory.interpolate import InterpolatedBlend
from dbtheory.reward import Reward
from proofs_check.claim import Row
from proofs_check.problems import Problem, largest_deviation, random_problems

SOURCE = "ours, beside paper eq. 9 and 10; MATH.md 4"
NAMES = ("r0", "r1", "r2")
EDGES: dict[tuple[str, str], str] = {edge: "-".join(edge) for edge in combinations(("base", *NAMES), 2)}
PREFERENCES = {
    "in w": Preference({"r0": 0.3, "r1": 0.7, "r2": 0}),
    "in lambda": Preference({"r0": 1, "r1": 0, "r2": 0}, 0.3),
    "at lambda = 1.5": Preference({"r0": 1, "r1": 0, "r2": 0}, 1.5),
    "in both, three rewards": Preference({"r0": 0.5, "r1": 0.3, "r2": 0.2}, 0.8),
}
NODES = [Preference({n: float(n == name) for n in NAMES}, scale) for name in NAMES for scale in (0.5, 1)] + [
    Preference({n: 0.5 * (n in pair) for n in NAMES}) for pair in combinations(NAMES, 2)
]
SMALL = 0.01  # the largest sd(R | x) where orders are fitted


@dataclass(frozen=True)
class Setting:
    """A problem at another alpha, with experts at the vertices and at this fraction of every edge."""

    problem: Problem
    alpha: float
    fraction: float = 0.5

    @cached_property
    def rewards(self) -> dict[str, Reward]:
        ends: dict[str, Reward] = {"base": 0 * self.problem.rewards[0], **self.problem.named}
        between = {EDGES[i, j]: (1 - self.fraction) * ends[i] + self.fraction * ends[j] for i, j in EDGES}
        return {name: reward for name, reward in (ends | between).items() if name != "base"}

    @cached_property
    def experts(self) -> ExactExperts:
        return ExactExperts(self.problem.prior, self.rewards, self.alpha, self.problem.schedule)

    def error(self, blend: Blender, preference: Preference) -> float:
        """Norm over the points of the blend's score less the exact one."""
        p = self.problem
        c = {name: float(value) for name, value in preference.coefficients().items()}
        exact = tilt(p.prior, combined_reward(self.rewards, c), self.alpha).noised(p.schedule, p.t).score(p.x)
        step = Step(0, 1, p.t, 0.0, torch.zeros(len(p.x)))
        return float((blend(self.experts, p.x, p.t, step) - exact).norm())


Pair = tuple[Setting, Setting]  # of one problem, the second at twice the alpha


def check() -> Iterator[Row]:
    problems = list(random_problems(16, (1, 2), seed=7, rewards=3, lowest_t=0.1))
    pairs = [_small(p) for p in problems]
    for said, preference in PREFERENCES.items():
        for name, blend, order in (("DB", _linear, 2), ("quadratic", _quadratic, 3)):
            worst = float(np.abs(_orders(pairs, blend, preference) - order).max())
            yield Row(f"{name}, {said}: |fitted order in 1/alpha - {order}|", worst, 0.15)
    in_w = PREFERENCES["in w"]
    worst = float(np.abs(_orders(pairs, _piecewise, in_w) - 2).max())
    yield Row("piecewise linear, in w: |fitted order in 1/alpha - 2|", worst, 0.15)
    misplaced = _orders([_small(p, fraction=0.4) for p in problems], _quadratic, in_w)
    what = "negative control: 3 less the highest order of quadratic, in w, with midpoints at 0.4"
    yield Row(what, float(3 - misplaced.max()), 1.5, ">=")
    nodes = [pairs[0][0].error(_quadratic(node), node) for node in NODES]
    yield Row("quadratic: error at the nodes", max(nodes), 1e-12)
    own = [Setting(p, p.alpha) for p in problems]
    ratios = [s.error(_quadratic(in_w), in_w) / s.error(_linear(in_w), in_w) for s in own]
    yield Row("median of quadratic's error over DB's at the problems' own alpha, in w", float(np.median(ratios)), 1.0)


def _small(p: Problem, fraction: float = 0.5) -> Pair:
    alpha = largest_deviation(p, p.rewards) / SMALL
    return Setting(p, alpha, fraction), Setting(p, 2 * alpha, fraction)


def _orders(pairs: list[Pair], blend: Callable[[Preference], Blender], preference: Preference) -> np.ndarray:
    errors = [[setting.error(blend(preference), preference) for setting in pair] for pair in pairs]
    return np.array([np.log2(near / far) for near, far in errors])


def _linear(preference: Preference) -> Blender:
    """DB: experts at the middle of edges are there, without a part."""
    weights = dict.fromkeys(EDGES.values(), 0.0)
    return MeanBlend(Preference({**preference.weights, **weights}, preference.kl_scale))


def _quadratic(preference: Preference) -> Blender:
    return InterpolatedBlend(preference, EDGES)


def _piecewise(preference: Preference) -> Blender:
    return InterpolatedBlend(preference, EDGES, "piecewise")
