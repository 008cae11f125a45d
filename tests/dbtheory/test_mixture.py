"""Gaussian mixtures against autograd, scipy, Bayes' rule on a lattice, simulation and high precision."""

import math

import mpmath
import pytest
import torch
from scipy import stats
from torch import Tensor

import dbtheory.mixture
from dbtheory.mixture import GaussianMixture
from dbtheory.schedule import NoiseSchedule, RectifiedFlow, VPLinear
from tests.chance import alarms, mean_p_value
from tests.dbtheory.bayes import lattice, log_posterior
from tests.dbtheory.strategies import SCHEDULES, normal, random_mixture

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
each_dim = pytest.mark.parametrize("dim", [1, 2, 3])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def line(*means: float, variance: float = 1.0) -> GaussianMixture:
    """Equal components on a line."""
    count = len(means)
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    centres = torch.tensor(means, dtype=torch.float64).unsqueeze(1)
    return GaussianMixture(weights, centres, torch.full((count, 1, 1), variance, dtype=torch.float64))


@each_dim
def test_log_prob_equals_scipy(dim: int) -> None:
    """The density is the weighted sum of multivariate normals."""
    mixture = random_mixture(3, dim, seeded(dim))
    x = 3 * normal((20, dim), seeded(1))
    parts = zip(mixture.weights, mixture.means, mixture.covariances, strict=True)
    density = sum(w.item() * stats.multivariate_normal(m.numpy(), c.numpy()).pdf(x.numpy()) for w, m, c in parts)
    torch.testing.assert_close(mixture.log_prob(x).exp(), torch.as_tensor(density), rtol=1e-11, atol=0)


@each_dim
def test_score_is_the_gradient_of_log_prob(dim: int) -> None:
    """The closed score against autograd, with one time for all points and with one each."""
    prior = random_mixture(4, dim, seeded(dim))
    x = (3 * normal((20, dim), seeded(1))).requires_grad_(True)
    for t in (0.2, torch.linspace(0.01, 1, 20, dtype=torch.float64)):
        noised = prior.noised(VPLinear(), t)
        (gradient,) = torch.autograd.grad(noised.log_prob(x).sum(), x)
        torch.testing.assert_close(noised.score(x.detach()), gradient, rtol=1e-11, atol=1e-11)


def test_parts_given_are_parts_returned() -> None:
    """Weights, means and covariances survive the eigendecomposition."""
    mixture = random_mixture(3, 3, seeded(0))
    again = GaussianMixture(mixture.weights, mixture.means, mixture.covariances)
    torch.testing.assert_close(again.covariances, mixture.covariances, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(again.weights, mixture.weights, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dim", [1, 2])
def test_moments_equal_sums_over_a_lattice(dim: int) -> None:
    """Mean and covariance of the whole mixture by quadrature of its density."""
    mixture = random_mixture(3, dim, seeded(dim))
    nodes = lattice([mixture])
    weights = mixture.log_prob(nodes).softmax(0)
    mean = weights @ nodes
    covariance = (weights * (nodes - mean).mT) @ (nodes - mean)
    torch.testing.assert_close(mixture.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixture.covariance, covariance, rtol=1e-12, atol=1e-12)


@each_schedule
@pytest.mark.parametrize("t", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("dim", [1, 2])
def test_posterior_equals_bayes_rule(schedule: NoiseSchedule, t: float, dim: int) -> None:
    """Mean and covariance of x_0 given x_t, and its density, against prior times likelihood on a lattice."""
    prior = random_mixture(3, dim, seeded(dim))
    x = prior.noised(schedule, t).sample(1, seeded(7))
    posterior = prior.posterior(schedule, x, t)
    nodes = lattice([posterior])
    log_weights = log_posterior(prior, schedule, x[0], t, nodes)
    weights = log_weights.exp()
    mean = weights @ nodes
    covariance = (weights * (nodes - mean).mT) @ (nodes - mean)
    torch.testing.assert_close(posterior.mean[0], mean, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(posterior.covariance[0], covariance, rtol=1e-9, atol=1e-13)
    likely = weights > 1e-12
    single = GaussianMixture(posterior.weights[0], posterior.means[0], posterior.covariances[0])
    torch.testing.assert_close(single.log_prob(nodes[likely]).log_softmax(0), log_weights[likely], rtol=1e-7, atol=1e-7)


@each_schedule
def test_tweedie(schedule: NoiseSchedule) -> None:
    """The posterior mean is `(x + sigma^2 score)/alpha`, with a time of its own for each point."""
    prior = random_mixture(3, 2, seeded(0))
    t = torch.linspace(0.05, 0.95, 11, dtype=torch.float64)
    x = prior.noised(schedule, t[5]).sample(11, seeded(1))
    denoised = x + schedule.variance(t)[:, None] * prior.noised(schedule, t).score(x)
    torch.testing.assert_close(
        prior.posterior(schedule, x, t).mean, denoised / schedule.alpha(t)[:, None], rtol=1e-10, atol=1e-10
    )


def test_times_for_each_point_equal_one_at_a_time() -> None:
    """Batching over times changes nothing but the speed."""
    prior, schedule = random_mixture(3, 2, seeded(0)), VPLinear()
    t = torch.linspace(0.05, 1, 6, dtype=torch.float64)
    x = normal((6, 2), seeded(1))
    batch, posterior = prior.noised(schedule, t), prior.posterior(schedule, x, t)
    assert (batch.weights.shape, batch.covariances.shape) == ((6, 3), (6, 3, 2, 2))
    for i in range(6):
        alone, row = prior.noised(schedule, t[i]), x[i : i + 1]
        torch.testing.assert_close(batch.score(x)[i : i + 1], alone.score(row), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(batch.log_prob(x)[i : i + 1], alone.log_prob(row), rtol=1e-12, atol=1e-13)
        one = prior.posterior(schedule, row, t[i])
        for part in ("weights", "means", "covariances", "mean", "covariance"):
            torch.testing.assert_close(getattr(posterior, part)[i], getattr(one, part)[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("t", [0.3, torch.linspace(0.1, 1, 10, dtype=torch.float64)])
def test_pieces_equal_the_whole(monkeypatch: pytest.MonkeyPatch, t) -> None:
    """Points are scored piece by piece; rows must not be lost or mixed at the seams."""
    mixture = random_mixture(3, 2, seeded(0)).noised(VPLinear(), t)
    x = normal((10, 2), seeded(1))
    whole = mixture.score(x), mixture.log_prob(x)
    monkeypatch.setattr(dbtheory.mixture, "_CHUNK_ENTRIES", 3 * 6)
    torch.testing.assert_close((mixture.score(x), mixture.log_prob(x)), whole, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("t", [0.3, torch.linspace(0.1, 1, 10, dtype=torch.float64)])
def test_gradients_pass_through_the_pieces(monkeypatch: pytest.MonkeyPatch, t) -> None:
    """Autograd differentiates density and score: the score's slopes are the Hessian of log_prob, in pieces as whole."""
    mixture = random_mixture(3, 2, seeded(0)).noised(VPLinear(), t)
    x = normal((10, 2), seeded(1)).requires_grad_(True)

    def derivatives() -> tuple[Tensor, Tensor, Tensor]:
        (slope,) = torch.autograd.grad(mixture.log_prob(x).sum(), x, create_graph=True)
        (hessian,) = torch.autograd.grad(slope[:, 0].sum(), x)
        (jacobian,) = torch.autograd.grad(mixture.score(x)[:, 0].sum(), x)
        return slope.detach(), hessian, jacobian

    slope, hessian, jacobian = derivatives()
    torch.testing.assert_close(jacobian, hessian, rtol=1e-10, atol=1e-11)
    monkeypatch.setattr(dbtheory.mixture, "_CHUNK_ENTRIES", 3 * 6)
    torch.testing.assert_close(derivatives(), (slope, hessian, jacobian), rtol=1e-13, atol=1e-14)


def test_far_from_the_origin_no_digit_is_lost() -> None:
    """Components 1e-3 wide, a million away: moved by a power of two, points and means keep their differences exactly.

    A norm expanded as `|x|^2 - 2 x.m + |m|^2`, or points rotated before the means are subtracted, would not.
    """
    near = random_mixture(4, 2, seeded(0))
    means = (1024 * 1024 * 1e-3 * near.means).round() / 2**20
    x = (1024 * 1024 * 1e-3 * normal((20, 2), seeded(1))).round() / 2**20
    narrow = GaussianMixture(near.weights, means, 1e-6 * near.covariances)
    moved = GaussianMixture(near.weights, means + 2**20, 1e-6 * near.covariances)
    assert torch.equal(moved.score(x + 2**20), narrow.score(x))
    assert torch.equal(moved.log_prob(x + 2**20), narrow.log_prob(x))


def moment_p_values(samples: Tensor, law: GaussianMixture) -> list[float]:
    """p-values of all first and second moments of the samples (n, d) under the law."""
    offsets = samples - law.mean
    dims = range(law.dim)
    first = [mean_p_value(offsets[:, i], 0.0) for i in dims]
    products = [(offsets[:, i] * offsets[:, j], law.covariance[i, j].item()) for i in dims for j in dims if i <= j]
    return first + [mean_p_value(values, expected) for values, expected in products]


@each_schedule
def test_noised_law_equals_simulation(schedule: NoiseSchedule) -> None:
    """Moments of alpha x_0 + sigma z at false-alarm level 1e-5; another time must raise the alarm."""
    prior, n, generator = random_mixture(3, 2, seeded(3)), 200_000, seeded(4)
    noise = normal((n, 2), generator)
    samples = schedule.alpha(0.4) * prior.sample(n, generator) + schedule.sigma(0.4) * noise
    assert not alarms(moment_p_values(samples, prior.noised(schedule, 0.4)))
    assert alarms(moment_p_values(samples, prior.noised(schedule, 0.8)))


def test_samples_follow_the_weights() -> None:
    """Shares of far components by chi-square at level 1e-5; equal shares instead must raise the alarm."""
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    mixture = GaussianMixture(weights, torch.tensor([[-20.0], [0.0], [20.0]]).double(), torch.ones(3, 1, 1).double())
    x = mixture.sample(50_000, seeded(5)).squeeze(1)
    counts = [(x < -10).sum().item(), (x.abs() < 10).sum().item(), (x > 10).sum().item()]
    assert stats.chisquare(counts, 50_000 * weights.numpy()).pvalue > 1e-5
    assert stats.chisquare(counts).pvalue < 1e-5


def test_same_generator_same_samples() -> None:
    """All randomness comes from the generator."""
    mixture = random_mixture(3, 2, seeded(0))
    assert torch.equal(mixture.sample(10, seeded(1)), mixture.sample(10, seeded(1)))


def exact_score(mixture: GaussianMixture, schedule: NoiseSchedule, x: float, t: float) -> float:
    """Score of a noised mixture on a line, in 60 digits."""
    a, v, x = (mpmath.mpf(value) for value in (schedule.alpha(t).item(), schedule.variance(t).item(), x))
    density = slope = mpmath.mpf(0)
    for w, m, c in zip(mixture.weights, mixture.means[:, 0], mixture.covariances[:, 0, 0], strict=True):
        variance = a**2 * mpmath.mpf(c.item()) + v
        offset = x - a * mpmath.mpf(m.item())
        part = mpmath.mpf(w.item()) / mpmath.sqrt(variance) * mpmath.exp(-(offset**2) / (2 * variance))
        density += part
        slope -= part * offset / variance
    return float(slope / density)


@pytest.mark.parametrize("schedule", [VPLinear(), RectifiedFlow()])
@pytest.mark.parametrize("t", [1e-5, 0.5, 1.0])
@pytest.mark.parametrize("x", [-1e3, 0.1, 1e3])
def test_score_in_the_far_tails_and_near_the_data(schedule: NoiseSchedule, t: float, x: float) -> None:
    """A thousand standard deviations out every density underflows; the score must still be right to 1e-12."""
    prior = line(-2.0, 1.0, 3.0, variance=0.5)
    with mpmath.workdps(60):
        expected = exact_score(prior, schedule, x, t)
    got = prior.noised(schedule, t).score(torch.tensor([[x]], dtype=torch.float64))
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_nearly_singular_components() -> None:
    """Standard deviations from 1e-4 to 10 in one covariance: density and score keep ten digits."""
    axes, _ = torch.linalg.qr(normal((2, 2), seeded(0)))
    variances = torch.tensor([1e-8, 100.0], dtype=torch.float64)
    covariance = (axes * variances) @ axes.T
    mixture = GaussianMixture(torch.ones(1).double(), torch.zeros(1, 2).double(), covariance[None])
    x = 3 * axes[:, 1]
    expected = -0.5 * 0.09 - 0.5 * variances.log().sum() - math.log(2 * math.pi)
    torch.testing.assert_close(mixture.log_prob(x[None])[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("wide", [0, 1, 2])
def test_the_widest_dtype_is_kept(wide: int) -> None:
    """One part in float64 makes the mixture float64, digits included: covariances were cast down to the means'."""
    parts = [torch.ones(1), torch.tensor([[1.5, -2.0]]), torch.eye(2).unsqueeze(0)]
    parts[wide] = parts[wide].double()
    parts[2] = parts[2] * (1 + 1e-10)
    mixture = GaussianMixture(*parts)
    assert {part.dtype for part in (mixture.log_weights, mixture.means, mixture.eigenvalues)} == {torch.float64}
    if wide == 2:
        torch.testing.assert_close(mixture.covariances, parts[2], rtol=1e-15, atol=0)


def test_float32_agrees_with_float64() -> None:
    """`.to(torch.float32)` computes in single precision and agrees to it, times given in float64 included."""
    prior = random_mixture(3, 2, seeded(0))
    x, t = normal((50, 2), seeded(1)), 0.2
    single = prior.to(torch.float32)
    for law, exact in (
        (single.noised(VPLinear(), t), prior.noised(VPLinear(), t)),
        (single, prior),
    ):
        assert law.score(x).dtype == torch.float32
        torch.testing.assert_close(law.score(x.float()).double(), exact.score(x), rtol=1e-4, atol=1e-4)
    assert single.sample(3, seeded(2)).dtype == torch.float32
    posterior = single.posterior(VPLinear(), x.float(), t)
    torch.testing.assert_close(posterior.mean.double(), prior.posterior(VPLinear(), x, t).mean, rtol=1e-4, atol=1e-4)
    far = single.score(torch.tensor([[1e3, -1e3]]))
    assert far.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_with_cpu() -> None:
    """`.to("cuda")` is the same mixture."""
    prior, x = random_mixture(3, 2, seeded(0)), normal((50, 2), seeded(1))
    on_gpu = prior.to("cuda").noised(VPLinear(), 0.2).score(x.cuda())
    torch.testing.assert_close(on_gpu.cpu(), prior.noised(VPLinear(), 0.2).score(x), rtol=1e-11, atol=1e-12)


ONE, ZERO, EYE = torch.ones(1).double(), torch.zeros(1, 2).double(), torch.eye(2).double()[None]


@pytest.mark.parametrize(
    ("weights", "means", "covariances", "message"),
    [
        (torch.ones(2).double() / 2, ZERO, EYE, "must be"),
        (ONE, ZERO[0], EYE, "must be"),
        (ONE, ZERO, EYE[:, :1, :1], "must be"),
        (0.9 * ONE, ZERO, EYE, "sum to 1"),
        (torch.tensor([1.5, -0.5]).double(), ZERO.repeat(2, 1), EYE.repeat(2, 1, 1), ">= 0"),
        (ONE, ZERO * math.nan, EYE, "finite"),
        (ONE * math.nan, ZERO, EYE, "finite"),
        (ONE, ZERO, -EYE, "positive definite"),
        (ONE, ZERO, torch.ones(1, 2, 2).double(), "positive definite"),
        (ONE, ZERO, torch.tensor([[[1.0, 0.5], [0.0, 1.0]]]).double(), "symmetric"),
        (ONE[:0], ZERO[:0], EYE[:0], "not empty"),
        (torch.ones(1).long(), ZERO.long(), EYE.long(), "floating"),
    ],
)
def test_impossible_mixtures_are_refused(weights, means, covariances, message: str) -> None:
    """Each error says what was wrong with which part."""
    with pytest.raises(ValueError, match=message):
        GaussianMixture(weights, means, covariances)


def test_weights_close_to_one_are_renormalised() -> None:
    """A sum of 1 to 1e-6 is rounding, and is put right."""
    mixture = GaussianMixture((1 + 5e-7) * ONE, ZERO, EYE)
    assert mixture.weights.item() == pytest.approx(1, abs=1e-15)


def test_bad_points_are_refused() -> None:
    """Points of another dimension or count, NaN, times of another shape, a batch of mixtures."""
    prior, schedule = random_mixture(2, 2, seeded(0)), VPLinear()
    batch = prior.noised(schedule, torch.tensor([0.1, 0.2, 0.3]))
    for law, points in ((prior, torch.zeros(4, 3)), (prior, torch.zeros(2)), (batch, torch.zeros(2, 2))):
        with pytest.raises(ValueError, match="points must be"):
            law.score(points)
    with pytest.raises(ValueError, match="NaN"):
        prior.log_prob(torch.full((1, 2), math.nan))
    with pytest.raises(ValueError, match="scalar or"):
        prior.noised(schedule, torch.full((2, 2), 0.5))
    with pytest.raises(ValueError, match="without noise"):
        prior.posterior(schedule, torch.zeros(1, 2), 0.0)
    with pytest.raises(ValueError, match="single mixture"):
        batch.sample(3, seeded(0))
    with pytest.raises(ValueError, match="single mixture"):
        batch.noised(schedule, 0.5)
    with pytest.raises(ValueError, match="points must be"):
        prior.posterior(schedule, torch.zeros(2, 2), torch.tensor([0.1, 0.2, 0.3]))
