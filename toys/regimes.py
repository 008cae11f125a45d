"""The regime map: every method's error over alpha and the conflict of the rewards, and who is best where."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dbtheory import tilt
from dbtheory.preference import BASE
from toys.families import FIRST, SECOND, conflicting
from toys.methods import judge
from toys.network import State, Training
from toys.problem import Budget
from toys.soup import NetworkExperts, fine_tune
from toys.sweeps import WEIGHT, conflicting_problem
from toys.toy import Toy

ALPHA_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
ANGLES = (0.0, 45.0, 90.0, 135.0, 180.0)
# what serves a preference with both knobs turned up
METHODS = {
    1.0: ("db", "ls", "ls-iid", "msdda", "piecewise", "quadratic", "corrected", "soup"),
    1.5: ("db", "quadratic", "corrected"),
}
# evaluations of a denoiser a step, then models to train: one of one, one of two, two of two, two with more algebra,
# two of three
BY_COST = ("soup", "ls", "ls-iid", "db", "corrected", "msdda", "piecewise", "quadratic")


@dataclass(frozen=True)
class Cells:
    """The cells of the map: alpha as multiples of the toy's, angles in degrees, and methods for each KL scale."""

    alpha_factors: Sequence[float] = ALPHA_FACTORS
    angles: Sequence[float] = ANGLES

    @property
    def draws(self) -> int:
        """How many times `regime_map` ticks for its draws."""
        return len(self.alpha_factors) * len(self.angles) * sum(len(names) for names in METHODS.values())


def regime_map(
    toy: Toy,
    base: State,
    budget: Budget,
    training: Training,
    cells: Cells,
    tick: Callable[[], object] | None = None,
    train_tick: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Errors `[alpha][angle]` of every method at w = 0.3, for each KL scale, JSON-able.

    `base` is the network trained on the toy's prior, from which every cell's experts are fine-tuned, all of
    them at once. The floor is the distance of an independent draw of each target.
    """
    networks = _networks(toy, base, training, cells, train_tick)
    layers = []
    for kl_scale, methods in METHODS.items():
        rows = [
            [
                judge(conflicting_problem(toy, angle, scale, kl_scale, networks[scale, angle]), methods, budget, tick)
                for angle in cells.angles
            ]
            for scale in cells.alpha_factors
        ]
        errors = {name: [[cell.errors[name] for cell in row] for row in rows] for name in ("floor", *methods)}
        layers.append({"kl_scale": kl_scale, "errors": errors})
    return {
        "w": WEIGHT,
        "alphas": [scale * toy.alpha for scale in cells.alpha_factors],
        "angles": list(cells.angles),
        "layers": layers,
    }


def winner(errors: Mapping[str, Sequence[Sequence[float | None]]], row: int, column: int) -> str:
    """The cheapest method of a cell within a quarter of the best, or no farther off than an independent draw."""
    cell = {name: table[row][column] for name, table in errors.items()}
    known = {name: error for name, error in cell.items() if name != "floor" and error is not None}
    limit = max(1.25 * min(known.values()), cell["floor"] or 0.0)
    return next(name for name in BY_COST if known.get(name, math.inf) <= limit)


def _networks(
    toy: Toy, base: State, training: Training, cells: Cells, tick: Callable[[], object] | None
) -> dict[tuple[float, float], NetworkExperts]:
    """The networks of each cell. The first reward is the same at every angle, so its expert is trained once."""
    wanted = {}
    for scale in cells.alpha_factors:
        for angle in cells.angles:
            cell = conflicting(toy, angle, scale)
            wanted[scale, angle] = tilt(cell.prior, cell.rewards[SECOND], cell.alpha)
            wanted[scale, FIRST] = tilt(cell.prior, cell.rewards[FIRST], cell.alpha)
    tuned = dict(zip(wanted, fine_tune(base, list(wanted.values()), toy.schedule, training, tick), strict=True))
    return {
        (scale, angle): NetworkExperts(
            {BASE: base, FIRST: tuned[scale, FIRST], SECOND: tuned[scale, angle]}, toy.schedule
        )
        for scale in cells.alpha_factors
        for angle in cells.angles
    }
