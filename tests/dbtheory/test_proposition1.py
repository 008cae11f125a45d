"""Proposition 1: the target's score is the prior's plus the control, and the control is Jensen's plus the
gap.

The three sides are computed apart: scores of noised mixtures (tilt, then noise), moments of the posterior
(noise, then tilt), and sums over a lattice by Bayes' rule. Errors are relative to the largest term of the
identity at that point.
"""

import pytest
import torch
from hypothesis import given
from torch import Tensor

from dbtheory.control import control, jensen_control, jensen_gap
from dbtheory.schedule import VPLinear
from dbtheory.tilt import tilt
from tests.dbtheory.bayes import Bayes
from tests.dbtheory.strategies import Problem, problems, random_mixture, random_reward, two_hundred

TOLERANCE = 1e-10


def relative_error(left: Tensor, right: Tensor, *terms: Tensor) -> float:
    """The largest over points of `|left - right|` against the largest norm among the terms."""
    largest = torch.stack([term.norm(dim=-1) for term in (left, right, *terms)]).amax(0)
    return ((left - right).norm(dim=-1) / largest).max().item()


def arguments(problem: Problem, index: int = 0) -> tuple:
    return (problem.prior, problem.rewards[index], problem.alpha, problem.schedule, problem.x, problem.t)


@two_hundred
@given(problems())
def test_tilt_then_noise_equals_noise_then_tilt(problem: Problem) -> None:
    """`score_target - score_prior = ubar + gap`, the right side from the posterior alone."""
    target = tilt(problem.prior, problem.rewards[0], problem.alpha).noised(problem.schedule, problem.t)
    prior = problem.prior.noised(problem.schedule, problem.t)
    u = target.score(problem.x) - prior.score(problem.x)
    ubar, gap = jensen_control(*arguments(problem)), jensen_gap(*arguments(problem))
    assert relative_error(u, ubar + gap, ubar, gap) < TOLERANCE


@two_hundred
@given(problems(max_dim=2, points=1))
def test_each_term_is_its_covariance(problem: Problem) -> None:
    """u, ubar and gap are the covariances of MATH.md 3, summed over a lattice by Bayes' rule."""
    reward, alpha = problem.rewards[0], problem.alpha
    posterior = problem.prior.posterior(problem.schedule, problem.x, problem.t)
    bayes = Bayes(problem.prior, problem.schedule, problem.x[0], problem.t, [posterior, tilt(posterior, reward, alpha)])
    u, ubar, gap = (f(*arguments(problem)) for f in (control, jensen_control, jensen_gap))
    assert relative_error(u, bayes.control(reward, alpha)[None], ubar, gap) < TOLERANCE
    assert relative_error(ubar, bayes.jensen_control(reward, alpha)[None], u, gap) < TOLERANCE
    assert relative_error(gap, bayes.jensen_gap(reward, alpha)[None], u, ubar) < TOLERANCE


@pytest.mark.parametrize("quantity", [control, jensen_gap])
def test_the_lattice_would_notice_another_alpha(quantity) -> None:
    """Negative control: a one per cent error of alpha is seen far above the tolerance."""
    problem = example()
    posterior = problem.prior.posterior(problem.schedule, problem.x, problem.t)
    tilted = tilt(posterior, problem.rewards[0], problem.alpha)
    bayes = Bayes(problem.prior, problem.schedule, problem.x[0], problem.t, [posterior, tilted])
    wrong = getattr(bayes, quantity.__name__)(problem.rewards[0], 1.01 * problem.alpha)
    assert relative_error(quantity(*arguments(problem)), wrong[None]) > 1e-4


def example() -> Problem:
    generator = torch.Generator().manual_seed(1)
    prior = random_mixture(2, 1, generator)
    rewards = [random_reward(1, 0.5, generator)]
    return Problem(prior, rewards, [1.0], 0.5, 1.0, VPLinear(), torch.tensor([[0.4]]).double(), 0.3)
