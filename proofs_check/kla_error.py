"""DB-KLA's error is `1/2 lambda (1 - lambda) grad Var(R | x_t)` to leading order: proportional to lambda (lambda - 1),
zero at lambda = 0 and 1, and of second order in 1/alpha. The paper's eq. 10 leaves it as a difference of gaps.

Random mixtures and rewards. "Small 1/alpha" means an alpha at which sd(R | x_t) is at most 0.01; as a negative
control, at the problems' own alpha the leading term does not describe the error.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from dbtheory import jensen_control
from dbtheory.blend_error import blend_error
from dbtheory.expansion import gap_series
from proofs_check.claim import Row
from proofs_check.problems import Problem, largest_deviation, random_problems

SOURCE = "paper Lemma 1, eq. 10; MATH.md 4"
SCALES = (0.1, 0.25, 0.5, 0.75, 1.25, 1.5, 2.0)
SMALL = 0.01


def check() -> Iterator[Row]:
    problems = list(random_problems(20, (1, 2), seed=6, lowest_t=0.1))
    small = [largest_deviation(p, p.rewards[:1]) / SMALL for p in problems]
    pairs = list(zip(problems, small, strict=True))
    orders = [np.log2(_size(p, alpha, scale) / _size(p, 2 * alpha, scale)) for p, alpha in pairs for scale in SCALES]
    yield Row("|fitted order in 1/alpha - 2|", float(np.abs(np.array(orders) - 2).max()), 0.1)
    exponents = np.array([_exponent(p, alpha) for p, alpha in pairs])
    yield Row("|fitted exponent of |lambda (lambda - 1)| - 1|", float(np.abs(exponents - 1).max()), 0.05)
    near = [_distance(p, alpha, scale) for p, alpha in pairs for scale in SCALES]
    yield Row(f"distance of the error to its leading term, relative to that term, sd(R) <= {SMALL}", max(near), 0.1)
    own = [_distance(p, p.alpha, scale) for p in problems for scale in SCALES]
    yield Row(
        "negative control: median of the error's distance to its leading term, relative to that term, at the problems' "
        "own alpha",
        float(np.median(own)),
        0.3,
        ">=",
    )
    ends = [_size(p, p.alpha, scale) / _control_size(p) for p in problems for scale in (0.0, 1.0)]
    yield Row("error at lambda = 0 and 1, relative to the Jensen control", max(ends), 1e-12)


def _error(p: Problem, alpha: float, scale: float) -> Tensor:
    coefficients = {"base": 1 - scale, "r": scale}
    return blend_error(p.prior, {"r": p.rewards[0]}, coefficients, alpha, p.schedule, p.x, p.t)


def _size(p: Problem, alpha: float, scale: float) -> float:
    return float(_error(p, alpha, scale).norm())


def _exponent(p: Problem, alpha: float) -> float:
    """The slope of log error against log |lambda (lambda - 1)|."""
    products = [abs(scale * (scale - 1)) for scale in SCALES]
    return float(np.polyfit(np.log(products), np.log([_size(p, alpha, scale) for scale in SCALES]), 1)[0])


def _distance(p: Problem, alpha: float, scale: float) -> float:
    """Of the error to `lambda (1 - lambda) grad kappa_2/2`, relative to that."""
    half_slope = gap_series(*p.arguments(p.rewards[0], alpha), order=2)[0]
    leading = scale * (1 - scale) * half_slope
    return float((_error(p, alpha, scale) - leading).norm() / leading.norm())


def _control_size(p: Problem) -> float:
    return float(jensen_control(*p.arguments(p.rewards[0])).norm())
