"""The tilted mixture against its definition, prior times exp(reward/alpha)."""

import math

import mpmath
import pytest
import torch
from scipy import integrate

from dbtheory.grid import GridLaw
from dbtheory.mixture import GaussianMixture
from dbtheory.reward import FunctionReward, LinearReward, QuadraticReward, RBFReward, SmoothReward
from dbtheory.schedule import VPLinear
from dbtheory.tilt import log_normalizer, tilt
from tests.dbtheory.bayes import lattice
from tests.dbtheory.strategies import normal, random_mixture, random_reward


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("dim", [1, 2])
def test_tilt_equals_quadrature(dim: int, alpha: float) -> None:
    """Normaliser, mean and covariance of prior times exp(r/alpha), summed over a lattice."""
    prior, reward = random_mixture(3, dim, seeded(dim)), random_reward(dim, alpha, seeded(1))
    target = tilt(prior, reward, alpha)
    nodes = lattice([prior, target])
    cell = (nodes[1:] - nodes[:-1]).norm(dim=1).min() ** dim
    log_mass = prior.log_prob(nodes) + reward(nodes) / alpha
    weights = log_mass.softmax(0)
    mean = weights @ nodes
    covariance = (weights * (nodes - mean).mT) @ (nodes - mean)
    torch.testing.assert_close(
        log_normalizer(prior, reward, alpha), log_mass.logsumexp(0) + cell.log(), rtol=1e-11, atol=1e-11
    )
    torch.testing.assert_close(target.mean, mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(target.covariance, covariance, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.01, 0.5])
@pytest.mark.parametrize("dim", [1, 2, 3, 8])
def test_density_is_the_definition(dim: int, alpha: float) -> None:
    """log p_target = log p_prior + r/alpha - log Z at every point, far from the mass too (paper eq. 6)."""
    prior, reward = random_mixture(4, dim, seeded(dim)), random_reward(dim, alpha, seeded(1))
    x = 10 * normal((50, dim), seeded(2))
    expected = prior.log_prob(x) + reward(x) / alpha - log_normalizer(prior, reward, alpha)
    torch.testing.assert_close(tilt(prior, reward, alpha).log_prob(x), expected, rtol=1e-10, atol=1e-9)


def test_tilts_compose() -> None:
    """Tilting by two rewards in turn is tilting by their sum, and the normalisers add up."""
    prior, r1, r2 = (random_mixture(3, 2, seeded(0)), *(random_reward(2, 0.5, seeded(i)) for i in (1, 2)))
    once, x = tilt(prior, r1 + r2, 1.0), normal((9, 2), seeded(3))
    first = tilt(prior, r1, 1.0)
    torch.testing.assert_close(tilt(first, r2, 1.0).log_prob(x), once.log_prob(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        log_normalizer(prior, r1, 1.0) + log_normalizer(first, r2, 1.0), log_normalizer(prior, r1 + r2, 1.0)
    )


def test_geometric_mean_of_targets() -> None:
    """p_target(w) is proportional to the product of p_i ** w_i for weights that sum to 1 (MATH.md 2)."""
    prior, r1, r2 = (random_mixture(3, 2, seeded(0)), *(random_reward(2, 0.5, seeded(i)) for i in (1, 2)))
    x = normal((9, 2), seeded(3))
    blend = tilt(prior, 0.3 * r1 + 0.7 * r2, 0.5).log_prob(x)
    product = 0.3 * tilt(prior, r1, 0.5).log_prob(x) + 0.7 * tilt(prior, r2, 0.5).log_prob(x)
    assert (blend - product).std() < 1e-12
    arithmetic = 0.3 * tilt(prior, r1, 0.5).log_prob(x).exp() + 0.7 * tilt(prior, r2, 0.5).log_prob(x).exp()
    assert (blend - arithmetic.log()).std() > 1e-2  # negative control: it is not the arithmetic mean


def test_a_posterior_is_tilted_row_by_row() -> None:
    """With one mixture for each row, each is tilted as it would be alone."""
    prior, reward = random_mixture(3, 2, seeded(0)), random_reward(2, 0.5, seeded(1))
    x, t = normal((4, 2), seeded(2)), torch.tensor([0.1, 0.3, 0.6, 1.0]).double()
    posterior = prior.posterior(VPLinear(), x, t)
    tilted, masses = tilt(posterior, reward, 0.5), log_normalizer(posterior, reward, 0.5)
    for i in range(4):
        row = GaussianMixture(posterior.weights[i], posterior.means[i], posterior.covariances[i])
        alone = tilt(row, reward, 0.5)
        torch.testing.assert_close(tilted.mean[i], alone.mean, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(tilted.covariance[i], alone.covariance, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(masses[i], log_normalizer(row, reward, 0.5), rtol=1e-11, atol=1e-12)


def test_small_alpha_in_high_precision() -> None:
    """alpha = 0.01 with far components: log Z of about 1e4 and weights of e^-1000 against 60 digits."""
    means, variance, q, b, alpha = (-5.0, 0.0, 4.0), 0.7, 3.0, -40.0, 0.01
    prior = GaussianMixture(
        torch.full((3,), 1 / 3, dtype=torch.float64),
        torch.tensor(means, dtype=torch.float64)[:, None],
        torch.full((3, 1, 1), variance, dtype=torch.float64),
    )
    reward = QuadraticReward(torch.tensor([[q]]).double(), torch.tensor([b]).double())
    with mpmath.workdps(60):
        v, precision = mpmath.mpf(variance), 1 / mpmath.mpf(variance) + mpmath.mpf(q) / mpmath.mpf(alpha)
        total = mpmath.mpf(0)
        for m in means:
            slope = m / v + b / mpmath.mpf(alpha)
            total += mpmath.exp(slope**2 / (2 * precision) - m**2 / (2 * v)) / mpmath.sqrt(v * precision) / 3
        expected = float(mpmath.log(total))
    assert log_normalizer(prior, reward, alpha).item() == pytest.approx(expected, rel=1e-12)
    assert tilt(prior, reward, alpha).log_weights.isfinite().all()


def test_float32() -> None:
    """A single-precision prior gives a single-precision target, whatever the reward's dtype."""
    prior, reward = random_mixture(3, 2, seeded(0)), random_reward(2, 0.5, seeded(1))
    single = tilt(prior.to(torch.float32), reward, 0.5)
    assert single.means.dtype == torch.float32
    torch.testing.assert_close(single.means.double(), tilt(prior, reward, 0.5).means, rtol=1e-4, atol=1e-5)


PRIOR = GaussianMixture(torch.ones(1).double(), torch.zeros(1, 2).double(), 2 * torch.eye(2).double()[None])
FLAT = LinearReward(torch.ones(2).double())


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_alpha_must_be_positive(alpha: float) -> None:
    """The strength of the KL term."""
    with pytest.raises(ValueError, match="alpha"):
        tilt(PRIOR, FLAT, alpha)


@pytest.mark.parametrize("curvature", [-0.5, -0.6, -100.0])
def test_a_target_of_infinite_mass_is_refused(curvature: float) -> None:
    """Precision 1/2 plus Q/alpha at or below zero: exactly zero is refused in spite of rounding."""
    reward = QuadraticReward(curvature * torch.eye(2).double(), torch.zeros(2).double())
    with pytest.raises(ValueError, match="not positive definite"):
        tilt(PRIOR, reward, 1.0)
    assert tilt(PRIOR, reward, 1000.0).mean.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precisions_that_cancel_are_refused_whatever_the_rounding(dtype: torch.dtype) -> None:
    """Precision 1/c - 1/c for 60 variances c: roots round up or down, as the processor's LAPACK has it."""
    eye, none = torch.eye(2, dtype=dtype), torch.zeros(2, dtype=dtype)
    for c in range(1, 61):
        prior = GaussianMixture(torch.ones(1, dtype=dtype), none[None], c * eye[None])
        with pytest.raises(ValueError, match="not positive definite"):
            tilt(prior, QuadraticReward(-eye / c, none), 1.0)
        nearly = tilt(prior, QuadraticReward(-0.999 * eye / c, none), 1.0)
        assert torch.allclose(nearly.covariance, 1000 * c * eye, rtol=2e-3)


def test_other_rewards_are_refused() -> None:
    """A reward of another dimension."""
    with pytest.raises(ValueError, match="3 coordinates"):
        tilt(PRIOR, LinearReward(torch.ones(3).double()), 1.0)


def test_a_strong_reward_in_one_direction_is_a_tilt_in_float32() -> None:
    """N(0, I) with Q = diag(1e4, 0) at alpha = 0.01: precision diag(1e6 + 1, 1) is definite, if ill-conditioned."""
    one = torch.ones(1)
    prior = GaussianMixture(one, torch.zeros(1, 2), torch.eye(2)[None])
    reward = QuadraticReward(torch.diag(torch.tensor([1e4, 0.0])), torch.zeros(2))
    covariance = tilt(prior, reward, alpha=0.01).covariance
    assert torch.allclose(covariance, torch.diag(torch.tensor([1 / (1e6 + 1), 1.0])), rtol=1e-5, atol=1e-9)


# Rewards that are not quadratic, and priors on a grid.


@pytest.mark.parametrize("dim", [1, 2])
def test_a_quadratic_reward_in_disguise(dim: int) -> None:
    """Given as a plain function it is tilted on a grid, which equals the closed form in law and normaliser."""
    prior, reward = random_mixture(3, dim, seeded(dim)), random_reward(dim, 0.5, seeded(1))
    exact, law = tilt(prior, reward, 0.5), tilt(prior, FunctionReward(reward), 0.5)
    assert isinstance(law, GridLaw)
    assert law.discretisation_error < 1e-2
    tolerance = {1: 1e-6, 2: 1e-3}[dim]
    torch.testing.assert_close(law.mean, exact.mean, rtol=0, atol=tolerance)
    torch.testing.assert_close(law.covariance, exact.covariance, rtol=0, atol=tolerance)
    normalizer = log_normalizer(prior, FunctionReward(reward), 0.5)
    torch.testing.assert_close(normalizer, log_normalizer(prior, reward, 0.5), rtol=0, atol=1e-10)
    for t in (0.0, 0.1, 0.5):
        noised = exact.noised(VPLinear(), t)
        x = noised.sample(200, seeded(2))
        assert (law.noised(VPLinear(), t).score(x) - noised.score(x)).abs().max() < 50 * tolerance


def test_an_indicator_equals_the_error_function() -> None:
    """r = 1 above an edge: the mass there, the mean and log Z from normal distribution functions, within the error."""
    one = torch.ones(1).double()
    prior = GaussianMixture(one, 0 * one[None], one[None, None])
    edge, height = 0.3, 2.0
    law = tilt(prior, FunctionReward(lambda x: height * (x[..., 0] > edge)), 1.0)
    assert isinstance(law, GridLaw)
    tail, density = 0.5 * math.erfc(edge / math.sqrt(2)), math.exp(-0.5 * edge**2) / math.sqrt(2 * math.pi)
    total = 1 + math.expm1(height) * tail
    error = law.discretisation_error
    assert error < 0.01
    assert float(law.mean) == pytest.approx(math.expm1(height) * density / total, abs=error)
    assert float(law.log_mass) == pytest.approx(math.log(total), abs=error)
    above = law.log_weights[law.axes[0] > edge].exp().sum().item()
    assert above == pytest.approx(math.exp(height) * tail / total, abs=error)


BUMPS = torch.tensor([0.8, 1.1]).double(), torch.tensor([1.0, -1.5]).double()


def test_a_bounded_reward_on_a_line_equals_scipys_quadrature() -> None:
    """log Z and the mean of a mixture tilted by bumps, by adaptive quadrature of the density's definition."""
    prior, reward, alpha = random_mixture(2, 1, seeded(1)), RBFReward(normal((2, 1), seeded(5)), *BUMPS), 0.3

    def density(z: float) -> float:
        x = torch.tensor([[z]], dtype=torch.float64)
        return float((prior.log_prob(x) + reward(x) / alpha).exp())

    law = tilt(prior, reward, alpha)
    options = {"epsabs": 1e-9, "epsrel": 1e-9, "limit": 200}
    total, _ = integrate.quad(density, -15, 15, **options)
    moment, _ = integrate.quad(lambda z: z * density(z), -15, 15, **options)
    assert float(log_normalizer(prior, reward, alpha)) == pytest.approx(math.log(total), abs=1e-8)
    assert float(law.mean) == pytest.approx(moment / total, abs=1e-6)


def test_a_bounded_reward_on_a_plane_equals_a_lattice() -> None:
    """log Z and the mean of a mixture tilted by bumps, summed over a lattice of its own."""
    prior, reward, alpha = random_mixture(2, 2, seeded(2)), RBFReward(normal((2, 2), seeded(5)), *BUMPS), 0.3
    nodes = lattice([prior], spacing=0.15)
    log_mass = prior.log_prob(nodes) + reward(nodes) / alpha
    cell = (nodes[1:] - nodes[:-1]).norm(dim=1).min() ** 2
    expected = log_mass.logsumexp(0) + cell.log()
    torch.testing.assert_close(log_normalizer(prior, reward, alpha), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(tilt(prior, reward, alpha).mean, log_mass.softmax(0) @ nodes, rtol=0, atol=1e-4)


def test_the_window_follows_the_mass() -> None:
    """A quadratic growth that carries the mass far out of the prior's window is followed; one without end is not."""
    one = torch.ones(1).double()
    prior = GaussianMixture(one, 0 * one[None], one[None, None])
    growing = QuadraticReward(torch.tensor([[-0.99]]).double(), torch.tensor([1.0]).double())
    exact, law = tilt(prior, growing, 1.0), tilt(prior, FunctionReward(growing), 1.0)
    assert float(exact.mean) == pytest.approx(100)
    assert float(law.mean) == pytest.approx(100, rel=1e-3)
    assert float(law.covariance) == pytest.approx(100, rel=1e-2)
    with pytest.raises(ValueError, match="leaves every window"):
        tilt(prior, FunctionReward(lambda x: x.square().sum(-1)), 1.0)


def test_a_prior_on_a_grid_keeps_its_grid() -> None:
    """Its tilt is the mixture's tilt, within the discretisation error, on the same nodes, for any reward."""
    prior, reward = random_mixture(3, 2, seeded(2)), random_reward(2, 0.5, seeded(1))
    grid = GridLaw.from_density(prior.log_prob, [-13, -13], [13, 13], [301, 301])
    exact, x = tilt(prior, reward, 0.5), normal((9, 2), seeded(3))
    for given in (reward, FunctionReward(reward)):
        law = tilt(grid, given, 0.5)
        assert isinstance(law, GridLaw)
        assert torch.equal(law.nodes, grid.nodes)
        torch.testing.assert_close(law.mean, exact.mean, rtol=0, atol=1e-3)
        torch.testing.assert_close(law.log_mass, log_normalizer(prior, reward, 0.5), rtol=0, atol=1e-9)
        score = exact.noised(VPLinear(), 0.1).score(x)
        torch.testing.assert_close(law.noised(VPLinear(), 0.1).score(x), score, rtol=0, atol=1e-3)


def test_a_grid_in_float32() -> None:
    """A single-precision prior gives a grid in single precision, made in double."""
    prior, reward = random_mixture(3, 2, seeded(0)), SmoothReward(lambda x: x.sin().sum(-1))
    single, double = (tilt(given, reward, 0.5) for given in (prior.to(torch.float32), prior))
    assert single.mean.dtype == torch.float32
    torch.testing.assert_close(single.mean.double(), double.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        log_normalizer(prior.to(torch.float32), reward, 0.5).double(),
        log_normalizer(prior, reward, 0.5),
        rtol=0,
        atol=1e-4,
    )


def test_tilts_without_a_grid_are_refused() -> None:
    """Three dimensions, one mixture for each row, a spike that no grid resolves, a reward that is NaN."""
    smooth = SmoothReward(lambda x: x.sin().sum(-1))
    posterior = PRIOR.posterior(VPLinear(), torch.zeros(4, 2), 0.5)
    for prior, reward, alpha, said in (
        (random_mixture(2, 3, seeded(0)), smooth, 1.0, "one or two dimensions"),
        (posterior, smooth, 1.0, "one or two dimensions"),
        (PRIOR, FunctionReward(lambda x: -x.square().sum(-1)), 1e-4, "does not resolve"),
        (PRIOR, FunctionReward(lambda x: x.sum(-1) * math.nan), 1.0, "NaN"),
        (PRIOR, smooth, 0.0, "alpha"),
    ):
        with pytest.raises(ValueError, match=said):
            tilt(prior, reward, alpha)
