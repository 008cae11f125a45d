"""What the project promises of its methods, measured on many toys: `python -m toys.targets`.

Each promise is a ratio: the error of a better method over that of plain DB (or of iid LS), and the most it may be.
A distance has a floor, that of exact draws; a method at the floor that misses its ratio is as good as can be seen, and
the verdict says so. Beside the interpolation's ratios stands the path KL of both blends, in nats: it is what one order
more is proven to shrink, while the distance of the samples also depends on how the errors along the path add up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dbtheory import MeanBlend
from dbtheory.blend import Step
from dbtheory.blend_error import path_kl
from dbtheory.correct import FeynmanKac, Trace
from dbtheory.interpolate import InterpolatedBlend
from toys.methods import draw, run
from toys.problem import Budget, Problem
from toys.registry import get, names
from toys.sweeps import two_rewards
from toys.toy import Toy

FIFTH, THIRD = 1 / 5, 1 / 3
LS_STEPS = (25, 50, 200)
KL_DRAWS = 500
SAME = 1.25  # times the floor: what means of a few runs cannot tell from it
HOLDS, FLOOR, FAILS = "holds", "at the floor", "fails"


@dataclass(frozen=True)
class Target:
    """`measured` may be at most `limit` times `reference`; `note` explains, `floor` is what exact draws have."""

    toy: str
    what: str
    reference: float
    measured: float
    floor: float
    limit: float
    note: str = ""

    @property
    def ratio(self) -> float:
        """How the better method compares."""
        return self.measured / self.reference

    @property
    def verdict(self) -> str:
        """Whether it holds; or that the method is as close as exact draws: the reference is too small to say."""
        if self.ratio <= self.limit:
            return HOLDS
        return FLOOR if self.measured <= SAME * self.floor else FAILS


def measure(toy: Toy, budget: Budget, seeds: int = 1) -> Iterator[Target]:
    """Every target on one toy, at its own alpha; distances are means over `seeds` runs."""
    first, second = two_rewards(toy)
    middle = {first: 0.5, second: 0.5}
    for weights, kl_scale in [(middle, 1.0), ({first: 1.0}, 0.5), ({first: 1.0}, 1.5)]:
        yield _correction(Problem(toy, weights, kl_scale), budget, seeds)
    # not at a node, so that the correction has something left to do
    yield _correction(Problem(toy, {first: 1.0}, 1.5), budget, seeds, interpolated=True)
    for weights, kl_scale in [({first: 1.0}, 0.25), ({first: 1.0}, 0.75), ({first: 0.25, second: 0.75}, 1.0)]:
        yield _interpolation(Problem(toy, weights, kl_scale), budget, seeds)
    for steps in LS_STEPS:
        yield _order(Problem(toy, middle), replace(budget, steps=steps))


def _correction(problem: Problem, budget: Budget, seeds: int, interpolated: bool = False) -> Target:
    """Feynman-Kac on plain DB, or on the quadratic interpolation; the reference is plain DB."""
    trace, experts, blender = Trace(), problem.experts(), MeanBlend(problem.preference)
    if interpolated:
        experts, blender = problem.midpoint_experts(), InterpolatedBlend(problem.preference, problem.midpoints)

    def corrected(one: Budget) -> Tensor:
        return run(experts, blender, one, correct=FeynmanKac(), trace=trace)

    errors = _errors(problem, corrected, budget, seeds)
    note = f"lowest ESS {float(trace.ess.min()):.2f}, {len(trace.resamplings)} resamplings"
    what = "corrected quadratic" if interpolated else "corrected"
    return Target(problem.toy.name, f"{what} / {_name(problem)}", *errors, FIFTH, note)


def _interpolation(problem: Problem, budget: Budget, seeds: int) -> Target:
    errors = _errors(problem, lambda one: draw("quadratic", problem, one), budget, seeds)
    return Target(problem.toy.name, f"quadratic / {_name(problem)}", *errors, THIRD, _path_kls(problem))


def _order(problem: Problem, budget: Budget) -> Target:
    """Root mean square distance to DB-MPA's own path under the same starting points and noise."""
    paths = {name: draw(name, problem, budget) for name in ("db", "ls", "ls-iid")}
    low, iid = (float((paths[name] - paths["db"]).square().sum(-1).mean().sqrt()) for name in ("ls", "ls-iid"))
    return Target(problem.toy.name, f"low-discrepancy / iid LS, {budget.steps} steps", iid, low, 0.0, THIRD)


def _errors(
    problem: Problem, better: Callable[[Budget], Tensor], budget: Budget, seeds: int
) -> tuple[float, float, float]:
    """Distances of plain DB, of the better method, and of exact draws: means over runs."""
    budgets = [replace(budget, seed=seed) for seed in range(budget.seed, budget.seed + seeds)]
    runs = [problem.distances({"db": draw("db", problem, one), "better": better(one)}, one) for one in budgets]
    reference, measured, floor = (sum(errors[name] for errors in runs) / seeds for name in ("db", "better", "floor"))
    return reference, measured, floor


def _path_kls(problem: Problem) -> str:
    """The path KL of DB and of the quadratic blend."""
    step = Step(0, 1, 1.0, 0.0, torch.zeros(1, dtype=torch.float64))
    quadratic = InterpolatedBlend(problem.preference, problem.midpoints).coefficients(step)
    rewards = problem.rewards | problem.midpoint_rewards
    toy = problem.toy
    kls = []
    for shares in (problem.preference.coefficients(), quadratic):
        coefficients = {name: float(c) for name, c in shares.items()}
        used = {name: rewards[name] for name in coefficients if name in rewards}
        generator = torch.Generator().manual_seed(0)
        kls.append(path_kl(toy.prior, used, coefficients, toy.alpha, toy.schedule, KL_DRAWS, generator)[0])
    return f"path KL {kls[0]:.3g} -> {kls[1]:.3g}"


def _name(problem: Problem) -> str:
    if problem.kl_scale != 1:
        return f"DB-KLA, λ = {problem.kl_scale:g}"
    return f"DB-MPA, w = {next(iter(problem.weights.values())):g}"


def table(targets: Sequence[Target]) -> str:
    """The targets as lines of text."""
    head = f"{'toy':14}{'target':38}{'reference':>10}{'measured':>10}{'floor':>8}{'ratio':>8}{'limit':>8}  verdict"
    lines = [
        f"{t.toy:14}{t.what:38}{t.reference:10.4f}{t.measured:10.4f}{t.floor:8.4f}{t.ratio:8.3f}{t.limit:8.3f}  "
        + t.verdict
        + (f" ({t.note})" if t.note else "")
        for t in targets
    ]
    return "\n".join([head, *lines])


def main(chosen: Sequence[str]) -> None:
    """Measure on the named toys, or on all of them, with 20,000 particles and 200 steps."""
    for name in chosen or names():
        print(table(list(measure(get(name), Budget(20_000, 200), seeds=3))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
