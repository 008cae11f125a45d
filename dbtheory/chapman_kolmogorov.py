"""The law of a sampler's chain in one dimension, step by step and without particles (MATH.md 6)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.schedule import NoiseSchedule
from dbtheory.steps import euler_maruyama_step

Scores = Callable[[Tensor, Tensor], Tensor]


def chain_densities(
    scores: Scores,
    weights: Float[Tensor, " m"],
    schedule: NoiseSchedule,
    nodes: Float[Tensor, " n"],
    times: Float[Tensor, " k"],
) -> Float[Tensor, "k n"]:
    """Densities at `nodes`, after each step, of Euler-Maruyama with one of m scores drawn at each step.

    It starts from N(0, sigma(times[0])^2); `times` decrease (0 = data, 1 = noise). `scores` maps points (n, 1) and a
    time to (m, n, 1); score i is taken with probability `weights[i]`, independently at each step. One score is the
    ordinary chain. Each step is the Chapman-Kolmogorov integral `p'(y) = sum_i w_i int N(y; x - drift_i h, g^2 h)
    p(x) dx` by the trapezoidal rule, which is accurate to rounding where the nodes are spaced evenly by less than
    half a step's deviation and cover the mass.

    Raises:
        ValueError: weights that are no probabilities, nodes too coarse for a step's noise, or that lose mass.
    """
    if bool((weights < 0).any()) or abs(float(weights.sum()) - 1) > 1e-9:
        raise ValueError(f"weights must be probabilities, got {weights.tolist()}; normalise")
    cells = torch.diff(0.5 * (nodes[1:] + nodes[:-1]), prepend=nodes[:1], append=nodes[-1:])
    points, sigma = nodes.unsqueeze(-1), schedule.sigma(times[0])
    densities = [torch.exp(-0.5 * (nodes / sigma) ** 2) / sigma / (2 * torch.pi) ** 0.5]
    for t, t_next in pairwise(times):
        deviation = (schedule.diffusion_squared(t) * (t - t_next)) ** 0.5
        if float(cells.max()) > 0.5 * float(deviation):
            raise ValueError(
                f"the nodes' spacing {cells.max():.3g} must be at most half of {deviation:.3g}, a step's noise"
            )
        still = torch.zeros_like(points)
        means = [euler_maruyama_step(points, score, t, t_next, still, schedule) for score in scores(points, t)]
        kernels = torch.exp(-0.5 * ((nodes - torch.stack(means)) / deviation) ** 2)  # (m, from, to)
        mass = densities[-1] * cells / deviation / (2 * torch.pi) ** 0.5
        densities.append(torch.einsum("m,x,mxy->y", weights, mass, kernels))
    lost = 1 - float(densities[-1] @ cells)
    if abs(lost) > 1e-6:
        raise ValueError(f"the nodes lose the mass {lost:.2g}; let them reach further")
    return torch.stack(densities)
