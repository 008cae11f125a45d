"""Bounds of the Jensen gap: each quantity by a second route, edges where digits or floats run out, bad input."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dbtheory.bounds import (
    all_bounds,
    covariance_bound,
    density_lemma,
    lemma_2_as_printed,
    pathwise_lemma,
    tightness,
)
from dbtheory.control import control, jensen_gap
from dbtheory.grid import GridLaw
from dbtheory.mixture import GaussianMixture
from dbtheory.reward import FunctionReward, LinearReward, QuadraticReward, RBFReward, Reward, SmoothReward
from dbtheory.reward_law import HypothesisError
from dbtheory.schedule import VE, NoiseSchedule, RectifiedFlow, VPLinear
from tests.dbtheory.bayes import Bayes
from tests.dbtheory.line import ALPHA, SCHEDULE, T, gaussian, point, seeded
from tests.dbtheory.strategies import normal, random_mixture, random_reward

# Lemma 2 as printed, and the covariance bound.


def test_printed_terms_in_closed_form() -> None:
    """N(0, 1) and R = b x_0/alpha: L1 = 0, L2^2 = e^(Var R) - 1, L3 = (1 + 1/alpha) |a b/alpha - 1| k/sd(R)."""
    a, s, b, k = float(SCHEDULE.alpha(T)), float(SCHEDULE.sigma(T)), 2.0 / ALPHA, 3.0
    printed = lemma_2_as_printed(gaussian(1), LinearReward(point(2.0)[0]), ALPHA, SCHEDULE, point(0.7), T, deviations=k)
    assert float(printed.L1) == pytest.approx(0, abs=1e-12)
    assert float(printed.L2) == pytest.approx(np.expm1((b * s) ** 2) ** 0.5, rel=1e-10)
    assert float(printed.L3) == pytest.approx((1 + 1 / ALPHA) * abs(a * b - 1) * k / (b * s), rel=1e-10)
    assert float(printed.bound) == pytest.approx(float(printed.L1 * printed.L2 + printed.L3))


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("kind", ["quadratic", "bumps", "jump"])
def test_covariance_bound_by_bayes_rule(dim: int, kind: str) -> None:
    """Both factors from Bayes' rule on a lattice, for a closed form, a smooth reward and one with jumps."""
    prior, x = random_mixture(2, dim, seeded(14)), normal((1, dim), seeded(15))
    rewards: dict[str, Reward] = {
        "quadratic": random_reward(dim, ALPHA, seeded(16)),
        "bumps": RBFReward(prior.means, point(1.0, 1.5)[0], point(0.8, -1.1)[0]),
        "jump": FunctionReward(lambda x: (x.sum(-1) > 0.3).to(x)),
    }
    reward = rewards[kind]
    bayes = Bayes(prior, SCHEDULE, x[0], T, [prior.posterior(SCHEDULE, x, T)], spacing=0.2 if dim == 1 else 0.25)
    R = reward(bayes.nodes) / ALPHA
    values = (R - (bayes.log_weights + R).logsumexp(0)).exp() - R
    variance = bayes.weights @ (values - bayes.weights @ values).square()
    covariance = bayes.offsets.mT @ (bayes.weights.unsqueeze(-1) * bayes.offsets)
    expected = bayes.scale * (variance * torch.linalg.eigvalsh(covariance)[-1]).sqrt()
    got = covariance_bound(prior, reward, ALPHA, SCHEDULE, x, T)
    # 24 Gauss-Hermite nodes resolve the bumps; a jump moves by up to a spacing on either lattice
    tolerance = {"quadratic": 1e-9, "bumps": 1e-5, "jump": 0.1}
    assert float(got) == pytest.approx(float(expected), rel=tolerance[kind])


@pytest.mark.parametrize("dim", [1, 2, 8])
def test_every_bound_holds_and_names_itself(dim: int) -> None:
    """Every bound is above |gap|, one time for each point included, and they go by these names."""
    prior, reward = random_mixture(2, dim, seeded(17)), LinearReward(normal((dim,), seeded(18)))
    x, t = normal((5, dim), seeded(19)), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    bounds = all_bounds(prior, reward, ALPHA, SCHEDULE, x, t)
    gap = jensen_gap(prior, reward, ALPHA, SCHEDULE, x, t).norm(dim=-1)
    names = {"covariance", "density, c = 0", "density, c = 1", "density, best c"}
    assert set(bounds) == names | ({"pathwise", "Lemma 2, 3 sd"} if dim == 1 else set())
    for name, bound in bounds.items():
        assert (bound / gap > 1 - 1e-9).all()
        one = all_bounds(prior, reward, ALPHA, SCHEDULE, x[2:3], float(t[2]))[name]
        torch.testing.assert_close(one, bound[2:3], rtol=1e-3 if name == "Lemma 2, 3 sd" else 1e-9, atol=0)


# Edges.


def gap_near_data(prior: GaussianMixture, reward: Reward, schedule: NoiseSchedule, x: Tensor, t: float) -> Tensor:
    """|gap|, on a line by the pathwise identity, which keeps its digits as t -> 0."""
    if prior.dim == 1:
        return pathwise_lemma(prior, reward, ALPHA, schedule, x, t).identity.abs().squeeze(-1)
    return jensen_gap(prior, reward, ALPHA, schedule, x, t).norm(dim=-1)


@pytest.mark.parametrize("schedule", [VPLinear(), VE(), RectifiedFlow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dim", [1, 2])
def test_next_to_the_data_no_digits_cancel(schedule: VPLinear | VE | RectifiedFlow, dim: int) -> None:
    """The bounds stay above a gap that falls like sigma^2; on a line the pathwise bound becomes tight."""
    prior = random_mixture(3, dim, seeded(22)) if dim == 1 else random_mixture(1, dim, seeded(22))
    reward, x = random_reward(dim, ALPHA, seeded(23)), normal((4, dim), seeded(24))
    for t in (1e-3, 1e-5):
        gap, bounds = gap_near_data(prior, reward, schedule, x, t), all_bounds(prior, reward, ALPHA, schedule, x, t)
        ratios = {name: bound / gap for name, bound in bounds.items()}
        assert all(bool((ratio > 1 - 1e-6).all()) for ratio in ratios.values())
        if dim == 1:
            # the correction is of relative order sigma^2
            assert (ratios["pathwise"] < 1 + 1e3 * schedule.variance(t)).all()
        covariance = covariance_bound(prior, reward, ALPHA, schedule, x, t) / schedule.sigma(t)
        nearby = covariance_bound(prior, reward, ALPHA, schedule, x, 2 * t) / schedule.sigma(2 * t)
        # sigma times a constant: digits lost in Var(e^R/F - R) would show here
        torch.testing.assert_close(covariance, nearby, rtol=0.1, atol=0)


def test_tiny_alpha_leaves_no_nan() -> None:
    """alpha = 0.005: e^R overflows, so bounds may be infinite; the gap and its identities stay exact."""
    prior, x = random_mixture(2, 1, seeded(25)), normal((3, 1), seeded(26))
    for reward in (LinearReward(point(0.6)[0]), QuadraticReward(torch.eye(1).double(), point(0.6)[0])):
        gap = jensen_gap(prior, reward, 0.005, SCHEDULE, x, T)
        lemma = pathwise_lemma(prior, reward, 0.005, SCHEDULE, x, T)
        torch.testing.assert_close(lemma.gap, gap, rtol=1e-8, atol=0)
        torch.testing.assert_close(lemma.identity, gap, rtol=1e-8, atol=0)
        for bound in all_bounds(prior, reward, 0.005, SCHEDULE, x, T).values():
            assert (bound >= gap.abs().squeeze(-1)).all()


def test_separated_components_move_quantiles_fast_and_break_nothing() -> None:
    """Two components 12 standard deviations apart: L1 is huge, the identity exact, the covariance bound useful."""
    prior = GaussianMixture(point(0.5, 0.5)[0], point(-6.0, 6.0).mT, torch.ones(2, 1, 1).double())
    reward, x = SmoothReward(lambda x: (x / 4).tanh().squeeze(-1)), point(0.0)
    lemma = pathwise_lemma(prior, reward, 1.0, RectifiedFlow(), x, 0.9)
    gap = jensen_gap(prior, reward, 1.0, RectifiedFlow(), x, 0.9, route="grid")
    torch.testing.assert_close(lemma.identity, gap, rtol=1e-7, atol=1e-9)
    assert float(lemma.L1) > 100 * float(covariance_bound(prior, reward, 1.0, RectifiedFlow(), x, 0.9))


def test_no_gap_no_bound_for_a_shift_family() -> None:
    """Gaussian prior, linear reward, d = 1 and 5: L1 and E|D|^2 vanish, so the pathwise and density bounds are 0."""
    for dim in (1, 5):
        reward, x = LinearReward(torch.ones(dim).double()), normal((3, dim), seeded(27))
        size = control(gaussian(dim), reward, 1.0, SCHEDULE, x, T).norm(dim=-1)
        bounds = all_bounds(gaussian(dim), reward, 1.0, SCHEDULE, x, T)
        for name in ("pathwise", "density, c = 0", "density, best c"):
            assert (bounds[name] < 1e-10 * size).all()


# What is refused.


def test_infinite_variance_of_the_tilt_is_an_error() -> None:
    """E[e^R] exists and E[e^(2R)] does not: L2 is infinite, on a line (lattice) and in the plane (closed)."""
    for dim in (1, 2):
        growing = QuadraticReward(-0.7 * torch.eye(dim).double(), torch.zeros(dim).double())
        arguments = (gaussian(dim), growing, 1.0, SCHEDULE, torch.zeros(1, dim).double(), 0.9)
        assert jensen_gap(*arguments).isfinite().all()
        with pytest.raises(ValueError, match="raise alpha"):
            covariance_bound(*arguments)


def test_where_no_coupling_or_sum_is_defined() -> None:
    """In the plane: no coupling of two components, none for other rewards, and the printed sum has no meaning."""
    two, x, linear = random_mixture(2, 2, seeded(0)), point(0.3, 0.1), LinearReward(point(1.0, 1.0)[0])
    with pytest.raises(HypothesisError, match="2 components"):
        pathwise_lemma(two, linear, 1.0, SCHEDULE, x, T)
    with pytest.raises(HypothesisError, match="FunctionReward"):
        pathwise_lemma(gaussian(2), FunctionReward(lambda x: x.sum(-1)), 1.0, SCHEDULE, x, T)
    with pytest.raises(HypothesisError, match="one dimension"):
        lemma_2_as_printed(gaussian(2), linear, 1.0, SCHEDULE, x, T)


def test_bad_input() -> None:
    """alpha, times, points, ranges and priors that make no sense."""
    prior, reward, x = gaussian(1), LinearReward(point(1.0)[0]), point(0.3)
    for bound in (covariance_bound, pathwise_lemma, density_lemma, lemma_2_as_printed, all_bounds):
        with pytest.raises(ValueError, match="alpha"):
            bound(prior, reward, 0.0, SCHEDULE, x, T)
        with pytest.raises(ValueError, match="noise"):
            bound(prior, reward, 1.0, SCHEDULE, x, 0.0)
        with pytest.raises(ValueError, match="points must be"):
            bound(prior, reward, 1.0, SCHEDULE, point(0.3, 0.1), T)
    with pytest.raises(ValueError, match="positive width"):
        lemma_2_as_printed(prior, reward, 1.0, SCHEDULE, x, T, deviations=0.0)
    variances = torch.tensor([[[1e-12]], [[1.0]]]).double()
    mixture = GaussianMixture(point(0.5, 0.5)[0], point(-1.0, 1.0).mT, variances)
    with pytest.raises(ValueError, match="differ less in width"):
        covariance_bound(mixture, reward, 1.0, SCHEDULE, x, 0.9)
    grid = GridLaw.from_density(prior.log_prob, [-8.0], [8.0], [201])
    with pytest.raises(ValueError, match="GaussianMixture"):
        covariance_bound(grid, reward, 1.0, SCHEDULE, x, T)


def test_rewards_that_promise_no_derivatives_leave_the_covariance_bound():
    """Autograd does not see a jump: bounds that differentiate R would be below the gap, so they are not offered."""
    x = torch.tensor([[0.1], [-0.5], [0.6]], dtype=torch.float64)
    for jump in (lambda x: x.sign().squeeze(-1), lambda x: (x + 2 * x.sign()).squeeze(-1)):
        given = (gaussian(1), FunctionReward(jump), 1.0, SCHEDULE, x, T)
        found = tightness(*given)
        assert list(found) == ["covariance"]
        assert bool((found["covariance"] > 1).all())
        with pytest.raises(HypothesisError, match="promises no derivatives"):
            pathwise_lemma(*given)


def test_tightness_is_the_bound_over_the_gap():
    """Every bound that applies, side by side, none below 1, and the best c never looser than the other two."""
    x = torch.tensor([[0.1], [-0.5], [0.6]], dtype=torch.float64)
    prior = GaussianMixture(
        torch.tensor([0.4, 0.6]), torch.tensor([[-1.0], [1.5]]), torch.tensor([[[0.5]], [[0.3]]], dtype=torch.float64)
    )
    found = tightness(prior, LinearReward(torch.ones(1, dtype=torch.float64)), 1.0, SCHEDULE, x, T)
    assert set(found) >= {"covariance", "pathwise", "density, c = 0", "density, c = 1", "density, best c"}
    assert all(bool((ratio > 1 - 1e-9).all()) for ratio in found.values())
    assert bool(
        (found["density, best c"] <= torch.minimum(found["density, c = 0"], found["density, c = 1"]) + 1e-9).all()
    )
