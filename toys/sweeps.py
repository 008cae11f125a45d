"""Errors along one variable at a time: weight, KL scale, alpha, steps, dimension and conflict of the rewards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from toys.families import FIRST, SECOND, conflicting, two_modes_power
from toys.methods import judge
from toys.problem import Budget, Problem
from toys.soup import NetworkExperts
from toys.toy import Toy

# off the middle: at w = 1/2 an interpolated blend is the middle's expert and proves nothing
WEIGHT = 0.3
SHARED = ("exact", "db", "ls", "ls-iid", "msdda", "piecewise", "quadratic", "corrected")
NETWORK_METHODS = ("network-db", "soup")
WEIGHTS = tuple(k / 8 for k in range(9))
KL_SCALES = tuple(k / 4 for k in range(9))
ALPHA_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
STEPS = (10, 20, 40, 80, 160)
DIMENSIONS = (1, 2, 3, 4, 6, 8)
ANGLES = (0.0, 45.0, 90.0, 135.0, 180.0)


@dataclass(frozen=True, eq=False)
class Sweep:
    """Problems, each with its budget, along the `values` of a variable; `fixed` says what does not vary."""

    name: str
    axis: str
    fixed: str
    values: tuple[float, ...]
    problems: Sequence[Problem]
    budgets: Sequence[Budget]
    methods: tuple[str, ...]

    @property
    def draws(self) -> int:
        """How many times `measure` ticks."""
        return len(self.values) * len(self.methods)


def measure(sweep: Sweep, tick: Callable[[], object] | None = None) -> dict[str, Any]:
    """The errors along a sweep, JSON-able: a list a method, None where it refused, and the last reason why."""
    cases = zip(sweep.problems, sweep.budgets, strict=True)
    judged = [judge(problem, sweep.methods, budget, tick) for problem, budget in cases]
    return {
        "name": sweep.name,
        "axis": sweep.axis,
        "fixed": sweep.fixed,
        "values": list(sweep.values),
        "errors": {name: [one.errors[name] for one in judged] for name in ("floor", *sweep.methods)},
        "refused": {name: reason for one in judged for name, reason in one.refused.items()},
    }


def plan(toy: Toy, budget: Budget, networks: NetworkExperts | None = None) -> list[Sweep]:
    """The sweeps that make sense on the toy; with networks, the soup is compared where they are its experts."""
    sweeps = [
        weight_sweep(toy, budget, networks),
        kl_sweep(toy, budget, networks),
        alpha_sweep(toy, budget),
        steps_sweep(toy, budget),
        dimension_sweep(budget),
    ]
    return [*sweeps, conflict_sweep(toy, budget)] if toy.dim > 1 else sweeps


def network_draws() -> int:
    """How many draws a plan gains by networks."""
    return len(NETWORK_METHODS) * (len(WEIGHTS) + len(KL_SCALES))


def weight_sweep(toy: Toy, budget: Budget, networks: NetworkExperts | None = None) -> Sweep:
    """Along w, the weight of the first reward; the second has 1 - w."""
    first, second = two_rewards(toy)
    problems = [Problem(toy, {first: w, second: 1 - w}, networks=networks) for w in WEIGHTS]
    return _sweep("weight", f"weight w of {first}", "λ = 1", WEIGHTS, problems, budget, _methods(networks))


def kl_sweep(toy: Toy, budget: Budget, networks: NetworkExperts | None = None) -> Sweep:
    """Along lambda, for the first reward alone: DB-KLA."""
    first, _ = two_rewards(toy)
    if networks is not None:
        networks = NetworkExperts({name: networks.states[name] for name in ("base", first)}, networks.schedule)
    problems = [Problem(toy, {first: 1.0}, kl_scale=scale, networks=networks) for scale in KL_SCALES]
    return _sweep("kl-scale", "KL scale λ", f"{first} alone", KL_SCALES, problems, budget, _methods(networks))


def alpha_sweep(toy: Toy, budget: Budget) -> Sweep:
    """Along alpha, at w = 0.3."""
    alphas = tuple(toy.alpha * factor for factor in ALPHA_FACTORS)
    problems = [_mixed(replace(toy, alpha=alpha)) for alpha in alphas]
    return _sweep("alpha", "α", f"w = {WEIGHT}, λ = 1", alphas, problems, budget, SHARED)


def steps_sweep(toy: Toy, budget: Budget) -> Sweep:
    """Along the number of steps, at w = 0.3."""
    budgets = [replace(budget, steps=steps) for steps in STEPS]
    values = tuple(float(steps) for steps in STEPS)
    fixed = f"w = {WEIGHT}, λ = 1"
    return Sweep("steps", "steps", fixed, values, [_mixed(toy)] * len(STEPS), budgets, SHARED)


def dimension_sweep(budget: Budget) -> Sweep:
    """Along the dimension, on powers of two-modes; without the kernels of MSDDA, whose size is n K d^2."""
    problems = [_mixed(two_modes_power(dim)) for dim in DIMENSIONS]
    values = tuple(float(dim) for dim in DIMENSIONS)
    methods = tuple(name for name in SHARED if name != "msdda")
    return _sweep("dimension", "dimension d", f"two modes in each, w = {WEIGHT}", values, problems, budget, methods)


def conflict_sweep(toy: Toy, budget: Budget) -> Sweep:
    """Along the angle between two linear rewards of equal strength, at w = 0.3 and half of the toy's alpha."""
    problems = [conflicting_problem(toy, angle, scale=0.5) for angle in ANGLES]
    fixed = f"linear rewards, w = {WEIGHT}, α = {0.5 * toy.alpha:g}"
    return _sweep("conflict", "angle between rewards (°)", fixed, ANGLES, problems, budget, SHARED)


def conflicting_problem(toy: Toy, angle: float, scale: float = 1.0, kl_scale: float = 1.0, networks=None) -> Problem:
    """Two linear rewards at an angle, at w = 0.3, see `families.conflicting`."""
    weights = {FIRST: WEIGHT, SECOND: 1 - WEIGHT}
    return Problem(conflicting(toy, angle, scale), weights, kl_scale, networks)


def two_rewards(toy: Toy) -> tuple[str, str]:
    """The rewards that figures compare: the toy's first two."""
    first, second, *_ = toy.rewards
    return first, second


def _mixed(toy: Toy) -> Problem:
    first, second = two_rewards(toy)
    return Problem(toy, {first: WEIGHT, second: 1 - WEIGHT})


def _methods(networks: NetworkExperts | None) -> tuple[str, ...]:
    return SHARED if networks is None else (*SHARED, *NETWORK_METHODS)


def _sweep(
    name: str,
    axis: str,
    fixed: str,
    values: tuple[float, ...],
    problems: Sequence[Problem],
    budget: Budget,
    methods: tuple[str, ...],
) -> Sweep:
    return Sweep(name, axis, fixed, values, problems, [budget] * len(problems), methods)
