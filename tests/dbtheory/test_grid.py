"""Laws on a grid: the dense mixture that they are, and the densities that they stand for."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from dbtheory.grid import GridLaw
from dbtheory.law import Law
from dbtheory.mixture import GaussianMixture
from dbtheory.schedule import VE, RectifiedFlow, VPLinear
from tests.chance import FALSE_ALARM, alarms, mean_p_value
from tests.dbtheory.strategies import normal, random_mixture

SCHEDULES = (VPLinear(), VE(), RectifiedFlow())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def on_grid(mixture: GaussianMixture, nodes: int) -> GridLaw:
    """The mixture's density on nine standard deviations around every component."""
    reach = 9 * mixture.covariances.diagonal(dim1=-2, dim2=-1).sqrt()
    low, high = (mixture.means - reach).amin(0), (mixture.means + reach).amax(0)
    return GridLaw.from_density(mixture.log_prob, low.tolist(), high.tolist(), [nodes] * mixture.dim)


def dense_mixture(law: GridLaw) -> GaussianMixture:
    """The same law, one component a node."""
    weights = law.log_weights.flatten().exp()
    return GaussianMixture(weights, law.nodes, law.spacing.square().diag().expand(len(weights), -1, -1))


def rough_law(dim: int) -> GridLaw:
    """Nothing smooth: random log densities with holes of no mass, on a coarse grid with unequal spacings."""
    shape = (13, 9)[:dim]
    holes = torch.rand(shape, generator=seeded(0)) < 0.2
    log_density = (3 * normal(shape, seeded(1))).masked_fill(holes, -math.inf)
    axes = [torch.linspace(-2, 2, 13).double(), torch.linspace(0, 5, 9).double()][:dim]
    return GridLaw(axes, log_density)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dim", [1, 2])
def test_it_is_the_dense_mixture(dim: int, schedule) -> None:
    """Log density and score equal the mixture's with one component a node, at every time, far points included."""
    law = rough_law(dim)
    mixture = dense_mixture(law)
    torch.testing.assert_close(law.mean, mixture.mean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(law.covariance, mixture.covariance, rtol=1e-12, atol=1e-13)
    x = torch.cat([3 * normal((20, dim), seeded(2)), torch.full((1, dim), 1e3), torch.full((1, dim), -60.0)])
    each = torch.linspace(0.0, schedule.t_start, len(x), dtype=torch.float64)
    for t in (0.0, 1e-3, 0.3, schedule.t_start, each):
        got, expected = law.noised(schedule, t), mixture.noised(schedule, t)
        torch.testing.assert_close(got.log_prob(x), expected.log_prob(x), rtol=1e-12, atol=1e-11)
        torch.testing.assert_close(got.score(x), expected.score(x), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(law.log_prob(x), mixture.log_prob(x), rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(law.score(x), mixture.score(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dim", [1, 2])
def test_points_where_products_underflow(dim: int) -> None:
    """Where the near nodes have no weight the sum is done in logs: a spike seen from 60 spacings away."""
    counts = (81, 9)[:dim]
    axes = [torch.arange(count).double() for count in counts]
    log_density = torch.full(counts, -math.inf, dtype=torch.float64)
    log_density[0] = 0.0
    law = GridLaw(axes, log_density)
    x = torch.tensor([[60.0, 4.0], [75.0, 0.0]]).double()[:, :dim]
    mixture = dense_mixture(law)
    assert mixture.log_prob(x).max() < -1000
    torch.testing.assert_close(law.log_prob(x), mixture.log_prob(x), rtol=1e-13, atol=0)
    torch.testing.assert_close(law.score(x), mixture.score(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dim", "nodes", "tolerance"), [(1, 401, 1e-6), (2, 161, 1e-2), (2, 321, 1e-4)])
def test_a_mixture_on_a_grid_is_the_mixture(dim: int, nodes: int, tolerance: float) -> None:
    """Scores at the mixture's own points, moments and log densities: closer on a finer grid, down to the ripple of
    the kernels, which is 3e-8/spacing = 7e-7 in the scores on a line."""
    mixture = random_mixture(3, dim, seeded(dim))
    law = on_grid(mixture, nodes)
    assert float(law.log_mass.abs()) < 1e-10
    torch.testing.assert_close(law.mean, mixture.mean, rtol=0, atol=tolerance)
    torch.testing.assert_close(law.covariance, mixture.covariance, rtol=0, atol=tolerance)
    for t in (0.0, 0.01, 0.1, 0.5, 1.0):
        noised = mixture.noised(VPLinear(), t)
        x = noised.sample(500, seeded(3))
        got = law.noised(VPLinear(), t)
        assert (got.log_prob(x) - noised.log_prob(x)).abs().max() < tolerance
        assert (got.score(x) - noised.score(x)).abs().max() < tolerance * noised.score(x).abs().max()


@pytest.mark.parametrize(("deviation", "tolerance"), [(3, 1e-3), (6, 5e-6)])
def test_sharpening_removes_the_kernels_width(
    deviation: int, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Gaussian of 3 and of 6 spacings keeps its variance; unsharpened, the kernels would add theirs."""
    reach = 13 * deviation

    def relative_variance() -> float:
        law = GridLaw.from_density(lambda x: -0.5 * (x[:, 0] / deviation).square(), [-reach], [reach], [2 * reach + 1])
        return float(law.covariance) / deviation**2

    assert abs(relative_variance() - 1) < tolerance
    monkeypatch.setattr("dbtheory.grid._SHARPENINGS", 0)
    assert relative_variance() == pytest.approx(1 + deviation**-2, rel=1e-9)  # negative control


@pytest.mark.parametrize("nodes", [65, 97, 129])
def test_discretisation_error_bounds_the_distance(nodes: int) -> None:
    """It exceeds the total variation to the law that is meant, by less than four orders of magnitude."""
    mixture = random_mixture(3, 2, seeded(2))
    law, fine = on_grid(mixture, nodes), on_grid(mixture, 401)
    distance = 0.5 * (law.log_prob(fine.nodes).exp() - mixture.log_prob(fine.nodes).exp()).abs().sum()
    true = float(distance * fine.spacing.prod())
    assert true <= law.discretisation_error <= 1e4 * true
    assert law.discretisation_error < on_grid(mixture, nodes // 2 + 1).discretisation_error


def test_a_window_that_is_too_small_shows() -> None:
    """Two standard deviations hold all but 4.6 per cent: the mass on the border counts as error."""
    tight = GridLaw.from_density(lambda x: -0.5 * x[:, 0].square(), [-2], [2], [201])
    wide = GridLaw.from_density(lambda x: -0.5 * x[:, 0].square(), [-9], [9], [201])
    assert tight.discretisation_error > 100 * wide.discretisation_error


@pytest.mark.parametrize("dim", [1, 2])
def test_score_is_the_gradient(dim: int) -> None:
    """The score against central differences of the log density."""
    law, x, step = on_grid(random_mixture(2, dim, seeded(1)), 65), normal((6, dim), seeded(2)), 1e-5
    for density in (law, law.noised(VPLinear(), 0.2)):
        for axis in range(dim):
            shift = step * torch.eye(dim).double()[axis]
            slope = (density.log_prob(x + shift) - density.log_prob(x - shift)) / (2 * step)
            torch.testing.assert_close(density.score(x)[:, axis], slope, rtol=1e-7, atol=1e-7)


def test_samples_follow_the_law() -> None:
    """20,000 draws: Kolmogorov-Smirnov along two directions, means and second moments; and another law is told."""
    mixture = random_mixture(3, 2, seeded(1))
    law = on_grid(mixture, 129)
    draws = law.sample(20_000, seeded(7))
    assert not alarms(sampling_p_values(draws, mixture))
    assert alarms(sampling_p_values(law.sample(20_000, seeded(7)) + 0.1, mixture))  # negative control


def sampling_p_values(draws: Tensor, mixture: GaussianMixture) -> list[float]:
    values = []
    for direction in (torch.tensor([1.0, 0.0]).double(), torch.tensor([0.6, -0.8]).double()):
        centres = (mixture.means @ direction).numpy()
        scales = torch.einsum("i,kij,j->k", direction, mixture.covariances, direction).sqrt().numpy()
        weights, line = mixture.weights.numpy(), draws @ direction

        def cdf(z, centres=centres, scales=scales, weights=weights):
            return (weights * stats.norm.cdf((z[:, None] - centres) / scales)).sum(1)

        values.append(float(stats.kstest(line.numpy(), cdf).pvalue))
        values.append(mean_p_value(line, float(mixture.mean @ direction)))
    offsets = draws - mixture.mean
    values.append(mean_p_value(offsets[:, 0] * offsets[:, 1], float(mixture.covariance[0, 1])))
    assert FALSE_ALARM < 1e-4
    return values


def test_both_laws_meet_the_protocol() -> None:
    """A mixture and a grid offer the same; a tensor does not."""
    assert isinstance(random_mixture(2, 2, seeded(0)), Law)
    assert isinstance(rough_law(2), Law)
    assert not isinstance(torch.zeros(2), Law)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points in pieces of two, one time each, give what they give together; none give none."""
    law, x, t = rough_law(2), normal((5, 2), seeded(0)), torch.linspace(0, 1, 5, dtype=torch.float64)
    together = law.noised(VPLinear(), t).score(x)
    monkeypatch.setattr("dbtheory.grid._CHUNK_ENTRIES", 44)
    torch.testing.assert_close(law.noised(VPLinear(), t).score(x), together, rtol=1e-13, atol=1e-13)
    assert law.score(x[:0]).shape == (0, 2)


def test_float32() -> None:
    """Axes in single precision give scores in single precision."""
    double = on_grid(random_mixture(2, 2, seeded(0)), 65)
    single = GridLaw([axis.float() for axis in double.axes], double.log_density)
    x = normal((9, 2), seeded(1))
    got = single.noised(VPLinear(), 0.3).score(x.float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), double.noised(VPLinear(), 0.3).score(x), rtol=1e-3, atol=1e-3)


def flat(x: Tensor) -> Tensor:
    return 0 * x[:, 0]


LINE = torch.linspace(0, 1, 9).double()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GridLaw.from_density(flat, [0] * 3, [1] * 3, [9] * 3), "more dimensions"),
        (lambda: GridLaw.from_density(flat, [0], [1, 2], [9]), "low, high and counts"),
        (lambda: GridLaw.from_density(flat, [0, 0], [1, 1], [4000, 4000]), "at most"),
        (lambda: GridLaw.from_density(flat, [0], [1], [8]), "at least 9"),
        (lambda: GridLaw.from_density(flat, [1], [0], [9]), "increase"),
        (lambda: GridLaw([LINE.square()], LINE), "even steps"),
        (lambda: GridLaw([LINE], LINE[:5]), "one log density a node"),
        (lambda: GridLaw([LINE], LINE * math.nan), "NaN"),
        (lambda: GridLaw([LINE], LINE * math.inf), "infinity"),
        (lambda: GridLaw([LINE], LINE - math.inf), "above -infinity"),
        (lambda: rough_law(2).score(torch.zeros(3, 1)), "points must be"),
        (lambda: rough_law(2).score(torch.full((3, 2), math.nan)), "NaN"),
        (lambda: rough_law(2).noised(VPLinear(), torch.ones(4)).score(torch.zeros(3, 2)), r"\(4, 2\)"),
        (lambda: rough_law(2).noised(VPLinear(), torch.ones(4, 1)), "scalar or"),
        (lambda: rough_law(2).noised(VPLinear(), 1.5), r"\[0, 1\]"),
    ],
)
def test_bad_input_is_refused(make, message: str) -> None:
    """Each error names what was wrong with the grid, the density, the points or the time."""
    with pytest.raises(ValueError, match=message):
        make()
