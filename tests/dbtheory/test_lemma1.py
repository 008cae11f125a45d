"""Lemma 1 (paper eq. 9 and eq. 10; MATH.md 4): blended drifts differ from the exact drift by the blended
gaps.

Drifts come from scores of noised targets, one target for each reward. Gaps come from covariances under the
posterior, by two routes of their own: the closed moments, and sums over a lattice by Bayes' rule. Errors are
relative to the largest term `g^2 |u|`, `g^2 |gap|` of the identity: the drift of the prior, common to both
sides, does not count.
"""

from collections.abc import Callable, Sequence

import torch
from hypothesis import given, settings
from torch import Tensor

from dbtheory.control import jensen_gap
from dbtheory.mixture import GaussianMixture
from dbtheory.reward import QuadraticReward
from dbtheory.tilt import tilt
from tests.dbtheory.bayes import Bayes
from tests.dbtheory.strategies import Problem, problems, two_hundred

TOLERANCE = 1e-10

Gap = Callable[[QuadraticReward, float], Tensor]


def drift(problem: Problem, law: GaussianMixture) -> Tensor:
    """`f x - g^2 score`, the drift of generation (paper eq. 2)."""
    schedule, t, x = problem.schedule, problem.t, problem.x
    score = law.noised(schedule, t).score(x)
    return schedule.drift_rate(t) * x - schedule.diffusion_squared(t) * score


def relative_error(left: Tensor, right: Tensor, terms: Sequence[Tensor]) -> float:
    largest = torch.stack([term.norm(dim=-1) for term in terms]).amax(0)
    return ((left - right).norm(dim=-1) / largest).max().item()


def error_of_equation_9(problem: Problem, gap: Gap) -> float:
    """`f_{r(w)} = sum w_i f_i + g^2 (sum w_i gap_i - gap_w)`."""
    prior, alpha, g2 = problem.prior, problem.alpha, problem.schedule.diffusion_squared(problem.t)
    rewards = [*problem.rewards, problem.blended_reward]
    *drifts, exact = [drift(problem, tilt(prior, reward, alpha)) for reward in rewards]
    *gaps, gap_of_blend = [g2 * gap(reward, alpha) for reward in rewards]
    blend = sum(w * f for w, f in zip(problem.weights, drifts, strict=True))
    remainder = sum(w * gap_i for w, gap_i in zip(problem.weights, gaps, strict=True)) - gap_of_blend
    base = drift(problem, prior)
    return relative_error(exact, blend + remainder, [f - base for f in [*drifts, exact]] + [*gaps, gap_of_blend])


def error_of_equation_10(problem: Problem, gap: Gap) -> float:
    """`f_{alpha/lambda} = (1 - lambda) f_prior + lambda f_r + g^2 (lambda gap_1 - gap_lambda)`."""
    prior, reward, scale = problem.prior, problem.rewards[0], problem.kl_scale
    g2 = problem.schedule.diffusion_squared(problem.t)
    base, aligned = drift(problem, prior), drift(problem, tilt(prior, reward, problem.alpha))
    exact = drift(problem, tilt(prior, reward, problem.alpha / scale))
    gap_1, gap_scaled = g2 * gap(reward, problem.alpha), g2 * gap(reward, problem.alpha / scale)
    blend = (1 - scale) * base + scale * aligned
    terms = [exact - base, aligned - base, gap_1, gap_scaled]
    return relative_error(exact, blend + scale * gap_1 - gap_scaled, terms)


def closed(problem: Problem) -> Gap:
    def gap(reward: QuadraticReward, alpha: float) -> Tensor:
        return jensen_gap(problem.prior, reward, alpha, problem.schedule, problem.x, problem.t)

    return gap


def by_bayes(problem: Problem) -> Gap:
    posterior = problem.prior.posterior(problem.schedule, problem.x, problem.t)
    rewards = [*problem.rewards, problem.blended_reward]
    around = [tilt(posterior, reward, problem.alpha) for reward in rewards]
    around.append(tilt(posterior, problem.rewards[0], problem.alpha / problem.kl_scale))
    bayes = Bayes(problem.prior, problem.schedule, problem.x[0], problem.t, [posterior, *around])
    return lambda reward, alpha: bayes.jensen_gap(reward, alpha)[None]


@two_hundred
@given(problems())
def test_lemma_1_with_closed_gaps(problem: Problem) -> None:
    """Both equations hold in up to three dimensions with gaps from moments of tilted posteriors."""
    assert error_of_equation_9(problem, closed(problem)) < TOLERANCE
    assert error_of_equation_10(problem, closed(problem)) < TOLERANCE


@two_hundred
@given(problems(max_dim=2, points=1))
def test_lemma_1_with_gaps_by_bayes_rule(problem: Problem) -> None:
    """Both equations hold with each gap one covariance over a lattice, free of formulas of the core."""
    gap = by_bayes(problem)
    assert error_of_equation_9(problem, gap) < TOLERANCE
    assert error_of_equation_10(problem, gap) < TOLERANCE


@settings(two_hundred, max_examples=20)
@given(problems())
def test_lemma_1_fails_without_its_remainder(problem: Problem) -> None:
    """Negative control: with the gaps left out the equations fail, so blending is not exact."""

    def none(reward: QuadraticReward, alpha: float) -> Tensor:
        return torch.zeros_like(problem.x)

    assert error_of_equation_9(problem, none) > 1e3 * TOLERANCE
