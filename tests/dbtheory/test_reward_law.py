"""The law of the reward given the noisy sample: its two scores, the density lemma's terms, what has no density."""

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from dbtheory.bounds import density_lemma
from dbtheory.control import jensen_control, jensen_gap
from dbtheory.dispersion import Given
from dbtheory.mixture import GaussianMixture
from dbtheory.reward import LinearReward, QuadraticReward, Reward, SmoothReward
from dbtheory.reward_law import HypothesisError, RewardLaw
from tests.dbtheory.line import ALPHA, SCHEDULE, STEP, Scipy, T, bent, gaussian, point, root, seeded, value
from tests.dbtheory.strategies import normal, random_mixture, random_reward


def score_of_reward_density(prior: GaussianMixture, reward: Reward, x: float, r: float) -> tuple[float, float]:
    """Both scores of p_R by finite differences of its logarithm, by change of variables with scipy's inverse."""

    def log_p(x: float, r: float) -> float:
        x0 = root(lambda z: value(reward, z) - r)
        slope = (value(reward, x0 + 1e-6) - value(reward, x0 - 1e-6)) / 2e-6
        return float(np.log(Scipy(prior, x).pdf(x0) / abs(slope)))

    along_x = (log_p(x + STEP, r) - log_p(x - STEP, r)) / (2 * STEP)
    along_r = (log_p(x, r + STEP) - log_p(x, r - STEP)) / (2 * STEP)
    return along_x, along_r


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_the_reward_density_on_a_line(sign: int) -> None:
    """Both scores of p_R(r|x) of a rising and a falling reward, against finite differences at three rewards."""
    prior, x, reward = random_mixture(2, 1, seeded(8)), 0.2, sign * bent()
    law = RewardLaw.of(Given(prior, reward, ALPHA, SCHEDULE, point(x), T))
    spread = float(law.line.mean(law.line.excess.square()).sqrt())
    for deviations in (-1.5, 0.1, 1.2):
        node = int((law.line.excess[0] - deviations * spread).abs().argmin())
        along_x, along_r = score_of_reward_density(prior, reward, x, float(law.line.reward[0, node]))
        assert float(law.score_x[0, node, 0]) == pytest.approx(along_x, rel=1e-4, abs=1e-4)
        assert float(law.score_r[0, node]) == pytest.approx(along_r, rel=1e-4, abs=1e-4)


def test_scores_of_a_linear_reward_in_the_plane() -> None:
    """R given x is a Gaussian mixture: both scores against autograd of its log density, from the posterior alone."""
    prior, x, reward = random_mixture(3, 2, seeded(9)), normal((1, 2), seeded(10)), LinearReward(point(1.0, -2.0)[0])
    given = Given(prior, reward, ALPHA, SCHEDULE, x, T)
    law = RewardLaw.of(given)
    b = reward.b / ALPHA
    r = (law.line.reward[0] + given.posterior.mean[0] @ b).requires_grad_(True)
    points = x.expand(len(r), 2).clone().requires_grad_(True)
    posterior = prior.posterior(SCHEDULE, points, T)
    means, deviations = posterior.means @ b, ((posterior.covariances @ b) @ b).sqrt()
    parts = torch.distributions.Normal(means, deviations).log_prob(r.unsqueeze(-1))
    along_x, along_r = torch.autograd.grad((posterior.log_weights + parts).logsumexp(-1).sum(), (points, r))
    torch.testing.assert_close(law.score_x[0], along_x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(law.score_r[0], along_r, rtol=1e-8, atol=1e-8)


def test_density_terms_equal_their_definitions() -> None:
    """L2, sd(e^R/F - R), the least spread over c and E|D|^2 against scipy's quadrature over x_0."""
    prior, x, reward = random_mixture(2, 1, seeded(11)), 0.2, bent()
    lemma, law = density_lemma(prior, reward, ALPHA, SCHEDULE, point(x), T), Scipy(prior, x)
    F, mean = law.mean(lambda z: np.exp(value(reward, z))), law.mean(lambda z: value(reward, z))

    def variance(c: float) -> float:
        centre = 1 - c * mean
        return law.mean(lambda z: (np.exp(value(reward, z)) / F - c * value(reward, z) - centre) ** 2)

    (best_c,) = optimize.minimize(lambda c: variance(float(c[0])), [1.0], tol=1e-12).x
    assert float(lemma.L2) == pytest.approx(variance(0) ** 0.5, rel=1e-8)
    assert float(lemma.unit_spread) == pytest.approx(variance(1) ** 0.5, rel=1e-8)
    assert float(lemma.best_spread) == pytest.approx(variance(best_c) ** 0.5, rel=1e-8)
    assert float(lemma.best_c) == pytest.approx(best_c, rel=1e-5)
    jensen = float(jensen_control(prior, reward, ALPHA, SCHEDULE, point(x), T, route="grid"))

    def square_of_D(z: float) -> float:
        along_x, along_r = score_of_reward_density(prior, reward, x, value(reward, z))
        return (along_x + along_r * jensen) ** 2

    z = np.array([Scipy(prior, x).quantile(omega) for omega in stats.norm.cdf(np.linspace(-4.5, 4.5, 61))])
    weights = stats.norm.pdf(np.linspace(-4.5, 4.5, 61))
    expected = weights @ [square_of_D(node) for node in z] / weights.sum()
    assert float(lemma.size_D) == pytest.approx(expected**0.5, rel=1e-3)


def test_both_routes_to_a_linear_reward_agree() -> None:
    """A linear reward on a line, and the same as a plain function: one law on R's lattice, the other on x_0's."""
    prior, x = random_mixture(3, 1, seeded(12)), normal((3, 1), seeded(13))
    named, plain = LinearReward(point(1.5)[0]), SmoothReward(lambda x: 1.5 * x.squeeze(-1))
    first, second = (density_lemma(prior, reward, ALPHA, SCHEDULE, x, T) for reward in (named, plain))
    for name in ("gap", "identity", "size_D", "L2", "unit_spread", "best_spread"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(first.identity, jensen_gap(prior, named, ALPHA, SCHEDULE, x, T), rtol=1e-9, atol=1e-11)


def test_what_has_no_density_is_refused() -> None:
    """Maxima, constants, flat tails and densities that stop abruptly: HypothesisError that names another bound."""
    line, x = gaussian(1), point(0.3)
    posterior = line.posterior(SCHEDULE, x, T)
    mean, deviation = posterior.mean, posterior.eigenvalues.squeeze(-1).sqrt()
    refused: list[Reward] = [
        QuadraticReward(torch.eye(1).double(), torch.zeros(1).double()),
        SmoothReward(lambda x: -x.square().sum(-1)),
        LinearReward(torch.zeros(1).double()),
        SmoothReward(lambda x: torch.special.ndtr((x - mean) / deviation).squeeze(-1)),
        SmoothReward(lambda x: (40 * x).tanh().squeeze(-1)),
    ]
    for reward in refused:
        with pytest.raises(HypothesisError, match="covariance_bound"):
            density_lemma(line, reward, 1.0, SCHEDULE, x, T)
    with pytest.raises(HypothesisError, match="covariance_bound"):
        density_lemma(gaussian(2), random_reward(2, 1.0, seeded(0)), 1.0, SCHEDULE, point(0.3, 0.1), T)
