"""Cumulants of the reward given a noisy sample, the gap's series, and where it converges."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from dbtheory.control import jensen_control, jensen_gap
from dbtheory.expansion import convergence_radius, gap_series, reward_cumulants
from dbtheory.grid import GridLaw
from dbtheory.mixture import GaussianMixture
from dbtheory.quadratic_cumulants import QuadraticCumulants
from dbtheory.reward import FunctionReward, LinearReward, QuadraticReward, Reward, SmoothReward
from dbtheory.schedule import VE, NoiseSchedule, VPLinear
from tests.dbtheory.bayes import lattice, log_posterior
from tests.dbtheory.strategies import SCHEDULES, normal, random_mixture, random_reward

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cumulants_of(weights: Tensor, values: Tensor) -> list[float]:
    """The first four of a discrete law, from central moments."""
    mean = float(weights @ values)
    m2, m3, m4 = (float(weights @ (values - mean) ** k) for k in (2, 3, 4))
    return [mean, m2, m3, m4 - 3 * m2**2]


@each_schedule
@pytest.mark.parametrize("dim", [1, 2])
def test_cumulants_equal_bayes_rule(schedule: NoiseSchedule, dim: int) -> None:
    """kappa_1 .. kappa_4 of a quadratic and of a smooth reward, against central moments summed on a lattice."""
    prior, x, t = random_mixture(2, dim, seeded(dim)), normal((1, dim), seeded(3)), 0.3
    rewards: tuple[Reward, ...] = (random_reward(dim, 0.7, seeded(2)), SmoothReward(lambda x: x.sin().sum(-1)))
    nodes = lattice([prior.posterior(schedule, x, t)], spacing=0.4)
    weights = log_posterior(prior, schedule, x[0], t, nodes).exp()
    for reward in rewards:
        got = reward_cumulants(prior, reward, 0.7, schedule, x, t)
        expected = cumulants_of(weights, reward(nodes) / 0.7)
        torch.testing.assert_close(got[:, 0].tolist(), expected, rtol=1e-9, atol=1e-9)


@each_schedule
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_terms_are_gradients_of_cumulants(schedule: NoiseSchedule, dim: int) -> None:
    """Each term of the series, a joint cumulant with x_0, against autograd of kappa_k in x; one time a point too."""
    prior, reward, x = (
        random_mixture(3, dim, seeded(dim)),
        random_reward(dim, 0.5, seeded(2)),
        normal((4, dim), seeded(3)),
    )
    for t in (0.3, torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=torch.float64)):
        terms = gap_series(prior, reward, 0.5, schedule, x, t, order=5)
        points = x.clone().requires_grad_(True)
        cumulants = reward_cumulants(prior, reward, 0.5, schedule, points, t, order=5)
        for k in range(2, 6):
            (gradient,) = torch.autograd.grad(cumulants[k - 1].sum(), points, retain_graph=True)
            torch.testing.assert_close(terms[k - 2], gradient / math.factorial(k), rtol=1e-8, atol=1e-9)


def test_a_step_reward_in_closed_form() -> None:
    """A reward that jumps: R is Bernoulli of probability `p(x) = sum_k w_k Phi(m_k/s_k)`. The lattice is off by half
    the mass of a cell at most, where 24 Gauss-Hermite nodes are off by 20 times as much."""
    prior, alpha, schedule, t = random_mixture(2, 1, seeded(0)), 0.7, VPLinear(), 0.5
    jump = float(prior.mean)
    step = FunctionReward(lambda x: (x[..., 0] > jump).to(x))
    x = torch.linspace(-2, 2, 9).double().unsqueeze(-1).requires_grad_(True)
    posterior = prior.posterior(schedule, x, t)
    shares = torch.special.ndtr((posterior.means[..., 0] - jump) / posterior.covariances[..., 0, 0].sqrt())
    p = (posterior.weights * shares).sum(-1)
    (slope,) = torch.autograd.grad(p.sum(), x, retain_graph=True)
    p = p.detach()
    half_cell = 0.5 * (17 / 2048) * 0.4
    got = reward_cumulants(prior, step, alpha, schedule, x.detach(), t, order=3)
    exact = torch.stack([p / alpha, p * (1 - p) / alpha**2, p * (1 - p) * (1 - 2 * p) / alpha**3])
    for k in range(3):
        assert float((got[k] - exact[k]).abs().max()) < half_cell / alpha ** (k + 1)
    (term,) = gap_series(prior, step, alpha, schedule, x.detach(), t, order=2)
    expected = (1 - 2 * p).unsqueeze(-1) * slope / (2 * alpha**2)
    torch.testing.assert_close(term, expected, rtol=0, atol=0.01 * float(expected.abs().max()))
    smooth = reward_cumulants(prior, SmoothReward(step), alpha, schedule, x.detach(), t, order=1)[0]
    assert float((smooth - exact[0]).abs().max()) > 20 * half_cell / alpha


def test_a_chunk_of_points_is_as_good_as_all() -> None:
    """Points on a plane by a lattice, more than fit at once: each as alone."""
    prior, x = random_mixture(2, 2, seeded(0)), normal((100, 2), seeded(1))
    reward = FunctionReward(lambda x: x.abs().sum(-1))
    together = gap_series(prior, reward, 0.5, VPLinear(), x, 0.3, order=3)
    alone = gap_series(prior, reward, 0.5, VPLinear(), x[-1:], 0.3, order=3)
    torch.testing.assert_close(together[:, -1:], alone)
    assert reward_cumulants(prior, reward, 0.5, VPLinear(), x, 0.3).shape == (4, 100)


def test_terms_against_finite_differences_for_a_smooth_reward() -> None:
    """A sine has no closed form: central differences of its cumulants on a line."""
    prior, schedule, t = random_mixture(2, 1, seeded(0)), VPLinear(), 0.4
    reward, x, h = SmoothReward(lambda x: x.squeeze(-1).sin()), normal((5, 1), seeded(1)), 1e-4

    def at(points: Tensor) -> Tensor:
        return reward_cumulants(prior, reward, 0.5, schedule, points, t)

    slopes = (at(x + h) - at(x - h)) / (2 * h)
    terms = gap_series(prior, reward, 0.5, schedule, x, t).squeeze(-1)
    expected = slopes[1:] / torch.tensor([[2.0], [6.0], [24.0]], dtype=torch.float64)
    torch.testing.assert_close(terms, expected, rtol=1e-6, atol=1e-8)


def test_the_first_cumulant_gives_the_jensen_control() -> None:
    """What the series leaves out: grad kappa_1 is the Jensen control (paper eq. 8)."""
    prior, reward, x = random_mixture(3, 2, seeded(0)), random_reward(2, 0.5, seeded(1)), normal((4, 2), seeded(2))
    points = x.clone().requires_grad_(True)
    mean = reward_cumulants(prior, reward, 0.5, VPLinear(), points, 0.3, order=1)
    assert mean.shape == (1, 4)
    (gradient,) = torch.autograd.grad(mean.sum(), points)
    torch.testing.assert_close(gradient, jensen_control(prior, reward, 0.5, VPLinear(), x, 0.3), rtol=1e-10, atol=1e-10)


def test_gaussian_reward_has_a_series_of_one_term() -> None:
    """One Gaussian: a linear reward is Gaussian, its cumulants stop at the second, which does not depend on x; a
    quadratic one has `kappa_k = (k-1)!/2 (-a)^k + k!/2 b^2 (-a)^(k-2)` in whitened coordinates."""
    prior, x, schedule = random_mixture(1, 1, seeded(0)), normal((3, 1), seeded(1)), VPLinear()
    linear = LinearReward(torch.tensor([1.3], dtype=torch.float64))
    assert reward_cumulants(prior, linear, 0.5, schedule, x, 0.4)[2:].abs().max() < 1e-12
    assert gap_series(prior, linear, 0.5, schedule, x, 0.4).abs().max() < 1e-12
    reward = QuadraticReward(torch.tensor([[0.8]]).double(), torch.tensor([0.3]).double())
    posterior = prior.posterior(schedule, x, 0.4)
    root = posterior.root.squeeze()
    a, b = float(root**2 * 0.8 / 0.5), root * reward.gradient(posterior.means)[:, 0, 0] / 0.5
    got = reward_cumulants(prior, reward, 0.5, schedule, x, 0.4, order=6)
    for k in range(2, 7):
        expected = math.factorial(k - 1) / 2 * (-a) ** k + math.factorial(k) / 2 * b**2 * (-a) ** (k - 2)
        # the moments are larger than the cumulants, which they lose digits to
        torch.testing.assert_close(got[k - 1], expected, rtol=1e-7, atol=1e-12)


def test_partial_sums_tend_to_the_gap_inside_the_radius_and_leave_it_outside() -> None:
    """At an alpha where every radius is above 1.5 the errors fall below 1e-6 in 30 terms; at a fifth of it, where
    every radius is below 0.8, they grow."""
    prior, reward, schedule, t = two_modes(), LinearReward(torch.ones(1).double()), VPLinear(), 0.5
    x = torch.linspace(-2, 2, 9).double().unsqueeze(-1)
    for alpha, converges in ((1.5, True), (0.3, False)):
        arguments = (prior, reward, alpha, schedule, x, t)
        radius, gap = convergence_radius(*arguments), jensen_gap(*arguments)
        errors = (gap_series(*arguments, order=31).cumsum(0) - gap).norm(dim=(1, 2))
        assert bool((radius > 1.5).all()) if converges else bool((radius < 0.8).all())
        assert float(errors[-1] / gap.norm()) < 1e-5 if converges else float(errors[-1] / errors[0]) > 1e3


def two_modes() -> GaussianMixture:
    half = torch.full((2,), 0.5, dtype=torch.float64)
    return GaussianMixture(half, torch.tensor([[-1.5], [1.5]]).double(), torch.full((2, 1, 1), 0.25).double())


def nearest_zero(prior: GaussianMixture, alpha: float, schedule: NoiseSchedule, x: Tensor, t: float) -> Tensor:
    """Two modes of one width, reward x: the modulus of the nearest zero of `w_1 e^(z r_1) + w_2 e^(z r_2)`."""
    posterior = prior.posterior(schedule, x, t)
    log_odds = posterior.log_weights.diff().squeeze(-1)
    distance = posterior.means[:, 1, 0] - posterior.means[:, 0, 0]
    return torch.hypot(log_odds, torch.full_like(log_odds, torch.pi)) * alpha / distance


def test_radius_in_closed_form() -> None:
    """Two modes, a linear reward, to rounding and in the far tails too."""
    prior, schedule, t = two_modes(), VPLinear(), 0.5
    x = torch.linspace(-6, 6, 13).double().unsqueeze(-1)
    for alpha in (0.01, 0.5, 10.0):
        radius = convergence_radius(prior, LinearReward(torch.ones(1).double()), alpha, schedule, x, t)
        expected = nearest_zero(prior, alpha, schedule, x, t)
        near = radius.isfinite()
        assert int(near.sum()) >= 9
        torch.testing.assert_close(radius[near], expected[near], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("weight", "separation", "deviation"),
    [(1e-6, 18.0, 0.1), (1e-9, 25.0, 0.05), (1e-12, 30.0, 0.05), (1e-100, 30.0, 0.05), (1e-300, 30.0, 0.05)],
)
def test_a_rare_component_decides_the_radius(weight: float, separation: float, deviation: float) -> None:
    """A mode of next to no weight, where 256 angles saw a hundred times the radius and so convergence; with so much
    noise that the posterior is the prior, the radius is `|log(w_2/w_1) + i pi|/separation`."""
    weights = torch.tensor([1 - weight, weight], dtype=torch.float64)
    means = torch.tensor([[0.0], [separation]], dtype=torch.float64)
    prior = GaussianMixture(weights, means, torch.full((2, 1, 1), deviation**2, dtype=torch.float64))
    schedule, x, reward = VE(sigma_max=1e4), torch.zeros(1, 1).double(), LinearReward(torch.ones(1).double())
    radius = convergence_radius(prior, reward, 1.0, schedule, x, 1.0)
    torch.testing.assert_close(radius, nearest_zero(prior, 1.0, schedule, x, 1.0), rtol=1e-12, atol=0)
    assert float(radius) == pytest.approx(abs(complex(math.log(weight), math.pi)) / separation, rel=1e-4)


def turns(law: QuadraticCumulants, radius: float) -> float:
    """Zeros in the disc, each of a conjugate pair's a half, by brute force: 2^16 angles, which must be enough."""
    circle = radius * torch.exp(1j * torch.linspace(0, math.pi, 2**16 + 1, dtype=torch.float64))
    values = law.generating_function(circle[None])[0]
    steps = (values[1:] * values[:-1].conj()).angle()
    assert float(steps.abs().max()) < 3, "the brute force does not resolve the phase"
    return float(steps.sum()) / (2 * math.pi)


@pytest.mark.parametrize("seed", range(5))
def test_no_zero_within_the_radius_and_one_on_it(seed: int) -> None:
    """Random problems, half of them with components down to e^-60, by counting zeros on very many angles: none within
    0.999 of the radius, one within 1.001, and none up to 0.95 of the search where none is said to be."""
    generator, schedule, zeros = seeded(seed), SCHEDULES[seed], 0
    for trial in range(10):
        dim, components = 1 + trial % 2, 2 + trial % 3
        prior = random_mixture(components, dim, generator)
        if trial % 4 > 1:
            rare = (prior.log_weights - torch.linspace(0, 60, components).double()).log_softmax(-1)
            prior = GaussianMixture.from_eigen(rare, 4 * prior.means, prior.eigenvalues, prior.eigenvectors)
        reward = random_reward(dim, 1.0, generator)
        x = 1.3 * prior.noised(schedule, 0.5).sample(1, generator)
        law = QuadraticCumulants.of(prior.posterior(schedule, x, 0.5), reward)
        radius = float(convergence_radius(prior, reward, 1.0, schedule, x, 0.5))
        branch, search = float(law.branch_point()), 12 / float(law.variance().sqrt())
        if radius < 0.9999 * branch and radius < math.inf:
            assert turns(law, 0.999 * radius) == pytest.approx(0, abs=1e-6)
            assert turns(law, 1.001 * radius) > 0.999
            zeros += 1
        else:
            assert turns(law, 0.95 * min(branch, search)) == pytest.approx(0, abs=1e-6)
    assert zeros >= 4


def test_radius_of_one_gaussian_is_the_branch_point() -> None:
    """One component has no zeros: a curved reward branches at 1/|curvature|, a linear one nowhere."""
    prior, schedule, x = random_mixture(1, 1, seeded(0)), VPLinear(), normal((3, 1), seeded(1))
    reward = QuadraticReward(torch.tensor([[2.0]]).double(), torch.tensor([0.3]).double())
    curvature = float(prior.posterior(schedule, x, 0.4).root.squeeze() ** 2 * 2.0 / 0.5)
    radius = convergence_radius(prior, reward, 0.5, schedule, x, 0.4)
    torch.testing.assert_close(radius, torch.full_like(radius, 1 / curvature), rtol=1e-12, atol=0)
    linear = LinearReward(torch.ones(1).double())
    assert bool(convergence_radius(prior, linear, 0.01, schedule, x, 0.4).isinf().all())
    assert bool(convergence_radius(prior, 0 * linear, 1.0, schedule, x, 0.4).isinf().all())


def test_radius_scales_with_alpha() -> None:
    """R is the reward over alpha: the radius is proportional to alpha, from 0.01 to 100."""
    prior, reward, x = random_mixture(3, 2, seeded(0)), random_reward(2, 0.5, seeded(1)), normal((5, 2), seeded(2))
    radii = [convergence_radius(prior, reward, alpha, VPLinear(), x, 0.3) / alpha for alpha in (0.5, 1.0, 100.0)]
    for left, right in pairwise(radii):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=0)


def test_radius_is_where_the_generating_function_vanishes() -> None:
    """Newton on `E[e^(zR)]`, summed on a lattice of complex exponentials, from points on the circle found: some zero
    lies on it to 1e-8, and none below 0.97 of it."""
    prior, reward, schedule, t = random_mixture(3, 1, seeded(4)), random_reward(1, 0.5, seeded(1)), VPLinear(), 0.3
    x = normal((1, 1), seeded(2))
    radius = float(convergence_radius(prior, reward, 0.5, schedule, x, t)[0])
    nodes = lattice([prior.posterior(schedule, x, t)], spacing=0.2)
    weights = log_posterior(prior, schedule, x[0], t, nodes).exp().numpy()
    values = (reward(nodes) / 0.5).numpy()

    def generating(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        terms = weights * np.exp(np.multiply.outer(z, values))
        return terms.sum(-1), (terms * values).sum(-1)

    z = radius * np.exp(1j * np.linspace(0, np.pi, 64))
    for _ in range(40):
        value, slope = generating(z)
        z = z - np.clip(np.abs(value / slope), 0, 0.1 * radius) * np.exp(1j * np.angle(value / slope))
    zeros = np.abs(z[np.abs(generating(z)[0]) < 1e-10])
    assert zeros.min() == pytest.approx(radius, rel=1e-8)


def test_cumulants_exist_where_no_tilt_does() -> None:
    """R so convex that e^R has no expectation: its mean and variance are those of a lattice, and its control a
    ValueError."""
    prior, x, schedule, t = random_mixture(2, 1, seeded(0)), normal((1, 1), seeded(1)), VPLinear(), 0.4
    growing = QuadraticReward(torch.tensor([[-50.0]]).double(), torch.zeros(1).double())
    nodes = lattice([prior.posterior(schedule, x, t)], spacing=0.3)
    weights = log_posterior(prior, schedule, x[0], t, nodes).exp()
    got = reward_cumulants(prior, growing, 1.0, schedule, x, t)[:, 0]
    torch.testing.assert_close(got.tolist(), cumulants_of(weights, growing(nodes)), rtol=1e-9, atol=1e-9)
    assert bool(gap_series(prior, growing, 1.0, schedule, x, t).isfinite().all())
    with pytest.raises(ValueError, match="positive definite"):
        jensen_gap(prior, growing, 1.0, schedule, x, t)


def test_a_prior_on_a_grid_is_refused() -> None:
    """Cumulants, series and radius need the components of a mixture, and say so."""
    prior, reward, x = random_mixture(2, 1, seeded(0)), random_reward(1, 0.5, seeded(1)), normal((3, 1), seeded(2))
    grid = GridLaw.from_density(prior.log_prob, [-8.0], [8.0], [201])
    for function in (gap_series, reward_cumulants, convergence_radius):
        with pytest.raises(ValueError, match="need a GaussianMixture as prior, got GridLaw"):
            function(grid, reward, 0.5, VPLinear(), x, 0.3)


def test_bad_input() -> None:
    """Orders, times, points and rewards that do not fit are ValueErrors."""
    prior, reward, x = random_mixture(2, 1, seeded(0)), random_reward(1, 0.5, seeded(1)), normal((3, 1), seeded(2))
    with pytest.raises(ValueError, match="starts at order 2, received order 1"):
        gap_series(prior, reward, 0.5, VPLinear(), x, 0.3, order=1)
    with pytest.raises(ValueError, match="at least 1, received 0"):
        reward_cumulants(prior, reward, 0.5, VPLinear(), x, 0.3, order=0)
    smooth = FunctionReward(lambda x: x.sin().sum(-1))
    with pytest.raises(ValueError, match="QuadraticReward"):
        convergence_radius(prior, smooth, 0.5, VPLinear(), x, 0.3)
    for function in (gap_series, reward_cumulants, convergence_radius):
        with pytest.raises(ValueError, match="without noise"):
            function(prior, reward, 0.5, VPLinear(), x, 0.0)
        with pytest.raises(ValueError, match="alpha"):
            function(prior, reward, -1.0, VPLinear(), x, 0.3)
        with pytest.raises(ValueError, match="points must be"):
            function(prior, reward, 0.5, VPLinear(), x[:, [0, 0]], 0.3)
