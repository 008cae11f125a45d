"""One interface for any reward: the method it asks for, values by independent routes, and an error that tells."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dbtheory.control import control, jensen_control, jensen_gap
from dbtheory.estimate import Estimate, estimate
from dbtheory.grid import GridLaw
from dbtheory.mixture import GaussianMixture
from dbtheory.reward import FunctionReward, LinearReward, RBFReward, Reward, SmoothReward, TanhReward
from dbtheory.schedule import RectifiedFlow, VPLinear
from tests.dbtheory.bayes import Bayes
from tests.dbtheory.strategies import SCHEDULES, normal, random_mixture, random_reward, uniform

ALPHA = 0.7


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rbf(dim: int) -> RBFReward:
    generator = seeded(10)
    return RBFReward(2 * normal((3, dim), generator), uniform(0.8, 1.5, (3,), generator), normal((3,), generator))


def tanh(dim: int) -> TanhReward:
    generator = seeded(11)
    return TanhReward(normal((2, dim), generator), normal((2,), generator), normal((2,), generator))


def network(dim: int) -> SmoothReward:
    """A perceptron with one hidden layer of eight, frozen."""
    layers = torch.nn.Sequential(torch.nn.Linear(dim, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    generator = seeded(12)
    for parameter in layers.parameters():
        parameter.data = normal(parameter.shape, generator) / parameter.shape[-1] ** 0.5
        parameter.requires_grad_(False)
    return SmoothReward(lambda x: layers(x).squeeze(-1))


def values(result: Estimate) -> tuple[Tensor, ...]:
    return (result.control, result.jensen_control, result.jensen_gap, result.log_expectation, result.expectation)


def distance(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


def by_bayes(
    prior: GaussianMixture, reward: Reward, schedule, x: Tensor, t: float, spacing: float
) -> tuple[Tensor, ...]:
    """The five quantities at one point (1, d), by Bayes' rule on a lattice."""
    bayes = Bayes(prior, schedule, x[0], t, [prior.posterior(schedule, x, t)], spacing=spacing)
    scaled = reward(bayes.nodes) / ALPHA
    three = (bayes.control(reward, ALPHA), bayes.jensen_control(reward, ALPHA), bayes.jensen_gap(reward, ALPHA))
    return (
        *(value[None] for value in three),
        (bayes.log_weights + scaled).logsumexp(0)[None],
        (bayes.weights @ scaled)[None],
    )


@pytest.mark.parametrize("make", [rbf, tanh, network])
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("t", [0.05, 0.4])
def test_smooth_rewards_equal_bayes_rule(make: Callable[[int], Reward], dim: int, t: float) -> None:
    """Gauss-Hermite on the posterior's components against the sum over a lattice, within the error that it states."""
    prior, reward, x = random_mixture(2, dim, seeded(dim)), make(dim), normal((1, dim), seeded(1))
    result = estimate(prior, reward, ALPHA, VPLinear(), x, t)
    expected = by_bayes(prior, reward, VPLinear(), x, t, spacing=0.15)
    assert (result.method, result.order) == ("quadrature", 48)
    assert result.error < 1e-3
    assert distance(values(result), expected) <= result.error + 1e-11
    wrong = estimate(prior, reward, 1.01 * ALPHA, VPLinear(), x, t)
    assert distance(values(wrong), expected) > 10 * result.error  # negative control: another alpha


@pytest.mark.parametrize("make", [rbf, tanh, network])
def test_in_three_dimensions_equals_bayes_rule(make: Callable[[int], Reward]) -> None:
    """The same in d = 3, for one component (a lattice for more would be too large)."""
    prior, reward, x = random_mixture(1, 3, seeded(5)), make(3), normal((1, 3), seeded(1))
    result = estimate(prior, reward, ALPHA, RectifiedFlow(), x, 0.3)
    expected = by_bayes(prior, reward, RectifiedFlow(), x, 0.3, spacing=0.35)
    assert distance(values(result), expected) <= result.error + 1e-9
    assert result.error < 1e-2


@pytest.mark.parametrize("make", [rbf, tanh, network])
def test_the_error_tracks_the_truth(make: Callable[[int], Reward]) -> None:
    """From order 4 to 64 the true error, against order 200, is below the stated one, and both fall."""
    prior, reward, x = random_mixture(2, 1, seeded(3)), make(1), normal((4, 1), seeded(1))
    exact = values(estimate(prior, reward, ALPHA, VPLinear(), x, 0.5, order=200))
    stated, true = [], []
    for order in (4, 8, 16, 32, 64):
        result = estimate(prior, reward, ALPHA, VPLinear(), x, 0.5, order=order)
        stated.append(result.error)
        true.append(distance(values(result), exact))
    assert all(t <= s + 1e-13 for t, s in zip(true, stated, strict=True))
    assert stated == sorted(stated, reverse=True)
    assert true[-1] < 1e-3 * true[0]


# Rewards that depend on few directions, in eight dimensions.


def rotated(plane: GaussianMixture, generator: torch.Generator) -> tuple[GaussianMixture, Tensor]:
    """The plane's mixture times independent normals in six more dimensions, turned by an orthogonal matrix.

    Rows of the matrix are the new axes: its first two span the plane.
    """
    axes, _ = torch.linalg.qr(normal((8, 8), generator))
    means = torch.cat([plane.means, torch.ones(len(plane.means), 6)], dim=1).double()
    covariances = torch.diag_embed(uniform(0.3, 1.2, (len(means), 8), generator)[:1].expand(len(means), -1)).clone()
    covariances[:, :2, :2] = plane.covariances
    return GaussianMixture(plane.weights, means @ axes, axes.mT @ covariances @ axes), axes


@pytest.mark.parametrize("make", [rbf, tanh, network])
def test_few_directions_in_eight_dimensions(make: Callable[[int], Reward]) -> None:
    """The control lies in the plane and equals the plane's own, by Bayes' rule after turning back."""
    plane, reward = random_mixture(2, 2, seeded(1)), make(2)
    prior, axes = rotated(plane, seeded(2))
    # Directions that span the plane, neither orthogonal nor of unit length.
    mixing = torch.tensor([[2.0, 0.3], [-0.5, 1.0]]).double()
    lifted = SmoothReward(lambda z: reward(z @ torch.linalg.inv(mixing).mT), mixing @ axes[:2])
    x = normal((1, 8), seeded(3))
    result = estimate(prior, lifted, ALPHA, VPLinear(), x, 0.3)
    flat = by_bayes(plane, reward, VPLinear(), (x @ axes.mT)[:, :2], 0.3, spacing=0.15)
    for got, expected in zip(values(result)[:3], flat[:3], strict=True):
        assert (got - expected @ axes[:2]).abs().max() <= result.error + 1e-11
    assert distance(values(result)[3:], flat[3:]) <= result.error + 1e-11
    assert result.error < 1e-3
    assert result.order == 48


def test_few_directions_that_correlate_with_all_others() -> None:
    """General covariances in d = 8: autograd of log E[e^R] and E[R], each summed over a lattice of projections."""
    prior, reward = random_mixture(3, 8, seeded(1)), tanh(8)
    assert reward.directions is not None
    directions, x, t = reward.directions, normal((3, 8), seeded(2)).requires_grad_(True), 0.3
    line = torch.arange(-8.5, 8.5, 0.1, dtype=torch.float64)
    zeta = torch.cartesian_prod(line, line)
    posterior = prior.posterior(VPLinear(), x, t)
    roots = torch.linalg.cholesky(directions @ posterior.covariances @ directions.mT)
    z = (posterior.means @ directions.mT).unsqueeze(-2) + zeta @ roots.mT
    # tanh(8) built as its own sum, apart from the class: amplitudes tanh(z + offset)
    generator = seeded(11)
    _, offsets, amplitudes = normal((2, 8), generator), normal((2,), generator), normal((2,), generator)
    scaled = ((z + offsets).tanh() * amplitudes).sum(-1) / ALPHA
    log_weights = posterior.log_weights.unsqueeze(-1) + (-0.5 * zeta.square().sum(-1)).log_softmax(0)
    log_expectation = (log_weights + scaled).flatten(1).logsumexp(-1)
    expectation = (log_weights.exp() * scaled).sum((-2, -1))
    u, ubar = (torch.autograd.grad(f.sum(), x, retain_graph=True)[0] for f in (log_expectation, expectation))
    expected = (u, ubar, u - ubar, log_expectation.detach(), expectation.detach())
    result = estimate(prior, reward, ALPHA, VPLinear(), x.detach(), t)
    assert distance(values(result), expected) <= result.error + 1e-11
    assert result.error < 1e-3
    for quantity, value in ((control, u), (jensen_control, ubar), (jensen_gap, u - ubar)):
        got = quantity(prior, reward, ALPHA, VPLinear(), x.detach(), t, route="autograd", order=48)
        assert (got - value).abs().max() <= result.error + 1e-11


def test_a_linear_term_adds_its_direction() -> None:
    """tanh of two directions plus a linear reward in d = 8: three dimensions of quadrature, equal to the two terms'
    Jensen controls added up."""
    prior, x = random_mixture(2, 8, seeded(1)), normal((2, 8), seeded(2))
    line = LinearReward(normal((8,), seeded(3)))
    whole = estimate(prior, tanh(8) + line, ALPHA, VPLinear(), x, 0.3, order=32)
    parts = [estimate(prior, reward, ALPHA, VPLinear(), x, 0.3, order=32) for reward in (tanh(8), line)]
    assert [part.method for part in parts] == ["quadrature", "closed"]
    total = parts[0].jensen_control + parts[1].jensen_control
    assert (whole.jensen_control - total).abs().max() < min(1e-5, whole.error)
    assert (whole.jensen_control - parts[0].jensen_control).abs().max() > 0.1  # negative control: the line matters


# Rewards that jump.


def halfspace(prior: GaussianMixture, normal_vector: Tensor, x: Tensor, t: float) -> tuple[Tensor, ...]:
    """The five quantities of `sign(n'x)`, by autograd of error functions."""
    x = x.clone().requires_grad_(True)
    posterior = prior.posterior(VPLinear(), x, t)
    deviation = ((posterior.covariances @ normal_vector) * normal_vector).sum(-1).sqrt()
    above = torch.special.ndtr(posterior.means @ normal_vector / deviation)
    log_expectation = (
        (posterior.weights * (above * math.exp(1 / ALPHA) + (1 - above) * math.exp(-1 / ALPHA))).sum(-1).log()
    )
    expectation = (posterior.weights * (2 * above - 1)).sum(-1) / ALPHA
    u, ubar = (torch.autograd.grad(f.sum(), x, retain_graph=True)[0] for f in (log_expectation, expectation))
    return u, ubar, u - ubar, log_expectation.detach(), expectation.detach()


@pytest.mark.parametrize("dim", [1, 2])
def test_a_sign_reward_equals_error_functions(dim: int) -> None:
    """On a lattice, in 40 problems: the stated error is of the size of the true one, which Gauss-Hermite misses."""
    generator, ratios, hermite = seeded(20 + dim), [], []
    for _ in range(40):
        prior, side = random_mixture(3, dim, generator), normal((dim,), generator)
        reward, t = FunctionReward(lambda x, side=side: (x @ side).sign()), float(uniform(0.05, 0.9, (1,), generator))
        x = prior.noised(VPLinear(), t).sample(4, generator)
        result, exact = estimate(prior, reward, ALPHA, VPLinear(), x, t), halfspace(prior, side, x, t)
        assert result.method == "grid"
        true = distance(values(result), exact)
        ratios.append(true / result.error)
        smooth = SmoothReward(reward)
        hermite.append(distance(values(estimate(prior, smooth, ALPHA, VPLinear(), x, t)), exact) / true)
    # An estimate and no bound: errors of several components may cancel in it.
    assert sorted(ratios)[20] < 1
    assert max(ratios) < 10
    assert sorted(hermite)[20] > 5


# The other methods.


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_quadratic_rewards_are_closed(schedule) -> None:
    """The method says so, the error is rounding, and the fields are what the functions return."""
    prior, reward, x = random_mixture(3, 4, seeded(0)), random_reward(4, ALPHA, seeded(1)), normal((5, 4), seeded(2))
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    result = estimate(prior, reward, ALPHA, schedule, x, t)
    assert (result.method, result.order) == ("closed", None)
    assert result.error < 1e-10 * float(result.control.abs().max())
    for quantity in (control, jensen_control, jensen_gap):
        field = getattr(result, quantity.__name__)
        torch.testing.assert_close(field, quantity(prior, reward, ALPHA, schedule, x, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dim", [1, 2])
def test_a_prior_on_a_grid(dim: int) -> None:
    """A mixture's density on a grid gives the mixture's values, for a quadratic and for a smooth reward."""
    prior, x = random_mixture(2, dim, seeded(dim)), normal((4, dim), seeded(1))
    nodes = {1: 1201, 2: 301}[dim]
    grid = GridLaw.from_density(prior.log_prob, [-13.0] * dim, [13.0] * dim, [nodes] * dim)
    for reward in (0.3 * random_reward(dim, ALPHA, seeded(4)), rbf(dim), tanh(dim)):
        for t in (0.1, torch.tensor([0.05, 0.3, 0.6, 1.0]).double()):
            expected = estimate(prior, reward, ALPHA, VPLinear(), x, t)
            result = estimate(grid, reward, ALPHA, VPLinear(), x, t)
            assert (result.method, result.order) == ("grid", nodes)
            assert distance(values(result), values(expected)) <= result.error + 1e-8 + expected.error
            assert result.error < 0.02
            for quantity in (control, jensen_control, jensen_gap):
                field = getattr(result, quantity.__name__)
                assert torch.equal(quantity(grid, reward, ALPHA, VPLinear(), x, t), field)


def test_no_points_are_no_error() -> None:
    """Zero points give empty fields by every method."""
    prior, x = random_mixture(2, 1, seeded(0)), torch.zeros(0, 1).double()
    for reward in (random_reward(1, ALPHA, seeded(1)), tanh(1), FunctionReward(lambda x: x.sign().sum(-1))):
        result = estimate(prior, reward, ALPHA, VPLinear(), x, 0.3)
        assert result.control.shape == (0, 1)
        assert result.error == 0


def test_what_has_no_method_is_refused() -> None:
    """A plain function in three dimensions, a smooth one in eight without directions, an order for a grid."""
    prior, plain = random_mixture(2, 3, seeded(0)), FunctionReward(lambda x: x.sum(-1))
    grid = GridLaw.from_density(lambda x: -0.5 * x[:, 0].square(), [-6], [6], [65])
    for law, reward, order, said in (
        (prior, plain, None, "SmoothReward"),
        (random_mixture(2, 8, seeded(0)), SmoothReward(plain), None, "directions"),
        (grid, plain, 10, "own nodes"),
        (prior, SmoothReward(plain), 1, "Gauss-Hermite"),
    ):
        with pytest.raises(ValueError, match=said):
            estimate(law, reward, ALPHA, VPLinear(), torch.zeros(2, law.dim).double(), 0.3, order=order)
