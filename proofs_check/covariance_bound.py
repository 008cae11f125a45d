"""The Jensen gap never exceeds `(a/s^2) sqrt(Var(e^R/F - R)) sqrt(lambda_max Cov(x_0|x_t))`, with no assumption at all.

It is Cauchy-Schwarz on the gap's covariance identity `(a/s^2) Cov(e^R/F - R, x_0)`, so it holds for any reward with a
finite `E[e^(2R)]`, in any dimension, without a density of R, a coupling or a boundary condition.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dbtheory.bounds import covariance_bound
from dbtheory.reward import Reward
from proofs_check.claim import Row
from proofs_check.problems import ROUNDING, Problem, bounded_reward, random_problems, reference_gap, violations

SOURCE = "in place of paper Lemma 2; MATH.md 5"


def check() -> Iterator[Row]:
    line = [_measure(p, r) for p, r in _problems(1000, (1,), seed=0)]
    space = [_measure(p, r) for p, r in _problems(1000, (2, 3), seed=1)]
    for name, found in (("1-D", line), ("2 and 3-D", space)):
        bound, gap = (torch.cat(column) for column in zip(*found, strict=True))
        yield violations(f"of the bound in {name}, quadratic and bounded rewards", gap, bound, len(found))
        yield Row(
            f"negative control: share of the points in {name} where half the bound is violated",
            float((0.5 * bound < gap)[gap > ROUNDING].double().mean()),
            0.05,
            ">=",
        )


def _problems(count: int, dims: tuple[int, ...], seed: int) -> Iterator[tuple[Problem, Reward]]:
    """Every other reward is quadratic; the others are bounded, with no closed form, in at most two dimensions."""
    generator = torch.Generator().manual_seed(seed)
    for index, problem in enumerate(random_problems(count, dims, seed, points=1, rewards=1)):
        bounded = index % 2 and problem.prior.dim <= 2
        yield problem, bounded_reward(problem, generator) if bounded else problem.combined


def _measure(problem: Problem, reward: Reward) -> tuple[Tensor, Tensor]:
    return covariance_bound(*problem.arguments(reward)), reference_gap(problem, reward).norm(dim=-1)
