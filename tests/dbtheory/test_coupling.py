"""The couplings of the pathwise lemma, and its terms, by finite differences and by samples."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dbtheory.bounds import pathwise_lemma
from dbtheory.control import jensen_control, jensen_gap
from dbtheory.dispersion import Given
from tests.chance import alarms, mean_p_value
from tests.dbtheory.line import ALPHA, SCHEDULE, STEP, Scipy, T, bent, point, seeded, value
from tests.dbtheory.strategies import normal, random_mixture, random_reward


@pytest.mark.parametrize("omega", [1e-6, 0.1, 0.45, 0.8, 1 - 1e-6])
def test_quantile_slope_is_the_finite_difference_of_quantiles(omega: float) -> None:
    """dT_x/dx against (T_(x+h) - T_(x-h))/2h with scipy's distribution functions, also far in the tails."""
    prior, x = random_mixture(3, 1, seeded(0)), 0.4
    given = Given(prior, bent(), ALPHA, SCHEDULE, point(x), T)
    slopes = given.line.quantile_slope(given.ratio.unsqueeze(-1))[0].numpy()
    nodes = (given.posterior.mean + given.line.offsets)[0].numpy()
    here, right, left = (Scipy(prior, x + shift).quantile(omega) for shift in (0, STEP, -STEP))
    got = np.interp(here, nodes, slopes)
    assert got == pytest.approx((right - left) / (2 * STEP), rel=2e-4)


@pytest.mark.parametrize("seed", range(3))
def test_pathwise_terms_equal_their_definitions(seed: int) -> None:
    """L1, L2 and the identity by quadrature over omega of finite differences of R(T_x(omega)), without the lattice."""
    prior, reward, x = random_mixture(2, 1, seeded(seed)), bent(), 0.3
    lemma = pathwise_lemma(prior, reward, ALPHA, SCHEDULE, point(x), T)
    laws = [Scipy(prior, x + shift) for shift in (-STEP, 0, STEP)]
    # quantiles at the normal distribution function of equally spaced z: the trapezoidal rule converges fast
    z = np.linspace(-5.5, 5.5, 221)
    weights = stats.norm.pdf(z) / stats.norm.pdf(z).sum()
    values = np.array([[value(reward, law.quantile(omega)) for omega in stats.norm.cdf(z)] for law in laws])
    change = (values[2] - values[0]) / (2 * STEP)
    change -= weights @ change
    ratio = np.exp(values[1]) / (weights @ np.exp(values[1]))
    assert float(lemma.L1) == pytest.approx(np.sqrt(weights @ change**2), rel=1e-4)
    assert float(lemma.L2) == pytest.approx(np.sqrt(weights @ (ratio - 1) ** 2), rel=1e-4)
    assert float(lemma.identity) == pytest.approx(weights @ ((ratio - 1) * change), rel=1e-4)


def test_affine_coupling_by_samples() -> None:
    """L1^2 = E|grad_x (R(T_x(omega)) - E[R|x])|^2 of finite differences in x, 20,000 draws of omega, alarm level 1e-5;
    twice the value is the negative control."""
    prior, reward = random_mixture(1, 2, seeded(1)), random_reward(2, ALPHA, seeded(2))
    x, omega = normal((1, 2), seeded(3)), normal((20_000, 2), seeded(4))
    lemma = pathwise_lemma(prior, reward, ALPHA, SCHEDULE, x, T)
    root = prior.posterior(SCHEDULE, x, T).root[0]

    def reward_along(x: Tensor) -> Tensor:
        return reward(prior.posterior(SCHEDULE, x, T).mean + omega @ root.mT) / ALPHA

    steps = 1e-3 * torch.eye(2).double()
    paths = torch.stack([(reward_along(x + step) - reward_along(x - step)) / 2e-3 for step in steps], dim=-1)
    squares = (paths - jensen_control(prior, reward, ALPHA, SCHEDULE, x, T)).square().sum(-1)
    assert not alarms([mean_p_value(squares, float(lemma.L1) ** 2)])
    assert alarms([mean_p_value(squares, 2 * float(lemma.L1) ** 2)])


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_pathwise_identity_is_the_gap(dim: int) -> None:
    """The identity, the lemma's own gap and `jensen_gap` agree: any prior on a line, one component elsewhere."""
    prior = random_mixture(3 if dim == 1 else 1, dim, seeded(5))
    reward, x = random_reward(dim, ALPHA, seeded(6)), normal((4, dim), seeded(7))
    lemma = pathwise_lemma(prior, reward, ALPHA, SCHEDULE, x, T)
    gap = jensen_gap(prior, reward, ALPHA, SCHEDULE, x, T)
    torch.testing.assert_close(lemma.identity, gap, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(lemma.gap, gap, rtol=1e-9, atol=1e-11)
