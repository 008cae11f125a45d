"""What a blend of exact experts misses is the gradient of one function (paper Lemma 1 with its remainder closed):
`score_DB - score_exact = grad G`, `G = sum_i c_i log E[e^(r_i/alpha) | x_t] - log E[e^(r(c)/alpha) | x_t]`. On the
simplex G >= 0 by Hoelder's inequality; with one reward and a KL scale above 1 its sign turns.

Three routes to grad G: scores of the exact experts, the Jensen gaps of Lemma 1, and autograd of G.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dbtheory import ExactExperts, Preference, QuadraticReward
from dbtheory.blend_error import blend_error, blend_error_series, blend_potential, combined_reward
from dbtheory.expansion import reward_cumulants
from proofs_check.claim import Row
from proofs_check.problems import Problem, largest_deviation, random_problems

SOURCE = "paper Lemma 1, eq. 9 and 10; MATH.md 4"
ROUNDING = 1e-12


def check() -> Iterator[Row]:
    yield from _identity()
    yield from _sign()
    yield from _leading_term()


def _identity() -> Iterator[Row]:
    """Both knobs at once: two rewards, KL scales 0.6 (inside the simplex) and 1.6 (beyond it)."""
    by_gaps, by_autograd = [], []
    for index, problem in enumerate(random_problems(45, (1, 2, 3), seed=3)):
        rewards, coefficients = _blend(problem, scale=(0.6, 1.6)[index % 2])
        arguments = (problem.prior, rewards, coefficients, problem.alpha, problem.schedule)
        scores, size = _score_difference(problem, rewards, coefficients)
        by_gaps.append(float((blend_error(*arguments, problem.x, problem.t) - scores).norm(dim=-1).max() / size))
        x = problem.x.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(blend_potential(*arguments, x, problem.t).sum(), x)
        by_autograd.append(float((gradient - scores).norm(dim=-1).max() / size))
    yield Row("score_DB - score_exact, against Lemma 1's gaps, relative to the score", max(by_gaps), 1e-10)
    yield Row("score_DB - score_exact, against autograd of G, relative to the score", max(by_autograd), 1e-10)


def _score_difference(
    problem: Problem, rewards: Mapping[str, QuadraticReward], coefficients: Mapping[str, float]
) -> tuple[Tensor, float]:
    """By the experts' scores alone, and the largest score."""
    exact = combined_reward(rewards, coefficients)
    experts = ExactExperts(problem.prior, {**rewards, "exact": exact}, problem.alpha, problem.schedule)
    scores = dict(zip(experts.names, experts.predict(problem.x, problem.t, experts.names), strict=True))
    difference = -scores["exact"]
    for name, c in coefficients.items():
        difference = difference + c * scores[name]
    return difference, max(float(score.norm(dim=-1).max()) for score in scores.values())


def _blend(problem: Problem, scale: float = 1.0) -> tuple[dict[str, QuadraticReward], dict[str, float]]:
    """The rewards by name, and the coefficients of the problem's preference at this KL scale."""
    preference = Preference(dict(zip(problem.named, problem.w, strict=True)), scale)
    return problem.named, {name: float(c) for name, c in preference.coefficients().items()}


def _sign() -> Iterator[Row]:
    on_simplex = torch.cat([_potential(p, *_blend(p, scale=0.8)) for p in _many(2000)])
    violations = int((on_simplex < -ROUNDING).sum())
    yield Row(f"points with G < 0 on the simplex, of {len(on_simplex)} in 2,000 problems", float(violations), 0.0)
    beyond = torch.cat([_potential(p, {"r": p.rewards[0]}, {"base": -0.5, "r": 1.5}) for p in _many(300)])
    share = float((beyond < -ROUNDING).double().mean())
    yield Row(f"negative control: share of {len(beyond)} points with G < 0 at a KL scale of 1.5", share, 0.99, ">=")


def _many(count: int) -> Iterator[Problem]:
    return random_problems(count, (1, 2, 3), seed=4, points=2)


def _potential(p: Problem, rewards: Mapping[str, QuadraticReward], coefficients: Mapping[str, float]) -> Tensor:
    return blend_potential(p.prior, rewards, coefficients, p.alpha, p.schedule, p.x, p.t)


def _leading_term() -> Iterator[Row]:
    """`1/2 grad sum_{i<j} c_i c_j Var(R_i - R_j | x)`, base included, by autograd of variances; at large alpha."""
    errors, remainders = [], []
    for problem in random_problems(30, (1, 2), seed=5, lowest_t=0.1):
        rewards, coefficients = _blend(problem, scale=1.4)
        alpha = 100 * problem.alpha * max(1.0, largest_deviation(problem, problem.rewards, problem.alpha))
        arguments = (problem.prior, rewards, coefficients, alpha, problem.schedule, problem.x, problem.t)
        pairs = _pairwise_variances(problem, rewards, coefficients, alpha)
        leading = blend_error_series(*arguments, order=2)[0]
        errors.append(float((pairs - leading).norm() / leading.norm()))
        remainders.append(float((blend_error(*arguments) - pairs).norm() / pairs.norm()))
    yield Row("first term of grad G: pairwise variances against cumulants, relative", max(errors), 1e-10)
    yield Row("grad G against its first term where sd(R) <= 0.02, relative", max(remainders), 0.1)


def _pairwise_variances(
    problem: Problem, rewards: Mapping[str, QuadraticReward], coefficients: Mapping[str, float], alpha: float
) -> Tensor:
    x = problem.x.clone().requires_grad_(True)
    vertices = [
        (coefficients["base"], 0 * problem.rewards[0]),
        *((coefficients[name], r) for name, r in rewards.items()),
    ]
    total = torch.zeros(len(x), dtype=x.dtype)
    for i, (c_i, r_i) in enumerate(vertices):
        for c_j, r_j in vertices[:i]:
            difference = r_i + -1 * r_j
            cumulants = reward_cumulants(problem.prior, difference, alpha, problem.schedule, x, problem.t, order=2)
            total = total + 0.5 * c_i * c_j * cumulants[1]
    (gradient,) = torch.autograd.grad(total.sum(), x)
    return gradient
