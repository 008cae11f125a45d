"""The law of reverse-time generation in one dimension, deterministically: its Fokker-Planck equation (MATH.md 6).

With `h` the time that has passed since noise, `d/dh p = -d/dx (b p - g^2/2 dp/dx)` and `b = g^2 score - f x`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import solve_banded
from torch import Tensor

from dbtheory.schedule import NoiseSchedule

Score = Callable[[Tensor, float], Tensor]


def evolve(
    score: Score,
    schedule: NoiseSchedule,
    nodes: Float[Tensor, " n"],
    times: Float[Tensor, " k"],
) -> Float[Tensor, "k n"]:
    """Densities at `nodes` and at each of `times` of the reverse SDE with drift `f x - g^2 score` (MATH.md 1).

    It starts from N(0, sigma(times[0])^2); `times` decrease (0 = data, 1 = noise), `nodes` increase and hold the
    mass: none leaves at their ends. `score` maps points (m, 1) and a time to (m, 1) and is never called at the
    last time. Fluxes of Scharfetter and Gummel (1969) and steps of Burchard, Deleersnijder and Meister (2003), so
    densities are positive, `torch.trapezoid(density, nodes)` is 1 up to rounding, and the error is of second
    order in the spacing and in the step; each interval of `times` is one step.

    Raises:
        ValueError: nodes that do not increase, or times that do not decrease.
    """
    x, grid = _checked(nodes, times)
    edges = 0.5 * (x[1:] + x[:-1])
    widths = np.diff(edges, prepend=x[0], append=x[-1])
    density = np.exp(-0.5 * (x / float(schedule.sigma(times[0]))) ** 2)
    densities = [density / (widths @ density)]
    for t, t_next in pairwise(grid):
        rates = _rates(score, schedule, x, edges, 0.5 * (t + t_next))
        densities.append(_step(densities[-1], rates, widths, t - t_next))
    return torch.from_numpy(np.stack(densities)).to(nodes)


def _rates(score: Score, schedule: NoiseSchedule, x: np.ndarray, edges: np.ndarray, t: float) -> np.ndarray:
    """Flux through each edge per density on its left, and per density on its right: (2, n - 1)."""
    g2, spacing = float(schedule.diffusion_squared(t)), np.diff(x)
    points = torch.from_numpy(edges).unsqueeze(-1)
    drift = g2 * score(points, t).squeeze(-1).numpy(force=True) - float(schedule.drift_rate(t)) * edges
    peclet = 2 * drift * spacing / g2
    return 0.5 * g2 / spacing * np.stack([_bernoulli(-peclet), _bernoulli(peclet)])


def _bernoulli(z: np.ndarray) -> np.ndarray:
    """`z / (e^z - 1)`, which is 1 at 0."""
    z = np.where(np.abs(z) < 1e-12, 1e-12, z)
    with np.errstate(over="ignore"):
        return z / np.expm1(z)


def _step(density: np.ndarray, rates: np.ndarray, widths: np.ndarray, h: float) -> np.ndarray:
    """Second order: implicit Euler, then the trapezoidal rule in Patankar's form, positive for every h."""
    predicted = _solve(density, rates, widths, h)
    # What the trapezoidal rule takes from the old density is put in proportion to the new one, which keeps the
    # matrix an M-matrix: no sign can turn. Zeros are densities that underflow.
    share = np.divide(density, predicted, out=np.ones_like(density), where=predicted > 0)
    average = 0.5 * rates * (1 + np.stack([share[:-1], share[1:]]))
    return _solve(density, average, widths, h)


def _solve(density: np.ndarray, rates: np.ndarray, widths: np.ndarray, h: float) -> np.ndarray:
    """The density after h, implicit in the fluxes `left p_i - right p_(i+1)`; conserves `widths @ density`."""
    left, right = rates
    banded = np.zeros((3, len(density)))
    banded[0, 1:], banded[2, :-1] = -h * right, -h * left
    banded[1] = widths - banded[0] - banded[2]
    solved = solve_banded((1, 1), banded, widths * density)
    kept = (widths @ solved) / (widths @ density)
    assert abs(kept - 1) < 1e-6, "columns sum to the widths: only rounding, amplified by narrow cells, may move mass"
    return solved / kept


def _checked(nodes: Tensor, times: Tensor) -> tuple[np.ndarray, list[float]]:
    x = nodes.detach().cpu().double()
    if len(x) < 3 or not bool((x.diff() > 0).all()):
        raise ValueError(f"nodes must be at least 3 and increase, got {len(x)} of them; sort them")
    if len(times) < 1 or not bool((times.diff() < 0).all()):
        raise ValueError(f"times must decrease, from noise to data, got {times.tolist()}; flip them")
    return x.numpy(), times.tolist()
