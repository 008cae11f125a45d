"""The potential of a blend's error: routes to its gradient, its sign, its series, and its path KL."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from scipy import integrate, stats
from torch import Tensor

from dbtheory import ExactExperts, InterpolatedBlend, Preference
from dbtheory.blend import Step
from dbtheory.blend_error import (
    blend_error,
    blend_error_series,
    blend_potential,
    combined_reward,
    path_kl,
    path_kl_on_line,
)
from dbtheory.expansion import reward_cumulants
from dbtheory.grid import GridLaw
from dbtheory.mixture import GaussianMixture
from dbtheory.reward import FunctionReward, LinearReward, QuadraticReward, Reward
from dbtheory.schedule import VE, NoiseSchedule, RectifiedFlow, VPLinear
from dbtheory.tilt import tilt
from tests.chance import alarms
from tests.dbtheory.bayes import lattice, log_posterior
from tests.dbtheory.strategies import SCHEDULES, Problem, normal, problems, random_mixture, random_reward, two_hundred

SINE = FunctionReward(lambda x: x.sin().sum(-1))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coefficients_of(preference: Preference) -> dict[str, float]:
    return {name: float(c) for name, c in preference.coefficients().items()}


def blend_of(problem: Problem) -> tuple[dict[str, Reward], dict[str, float]]:
    rewards: dict[str, Reward] = {f"r{i}": reward for i, reward in enumerate(problem.rewards)}
    preference = Preference(dict(zip(rewards, problem.weights, strict=True)), problem.kl_scale)
    return rewards, coefficients_of(preference)


@settings(two_hundred, max_examples=60)
@given(problems())
def test_three_routes_to_the_error(problem: Problem) -> None:
    """`score_DB - score_exact` by the exact experts, by Lemma 1's gaps and by autograd of G, for lambda up to 2; and
    G >= 0 where lambda <= 1."""
    rewards, coefficients = blend_of(problem)
    arguments = (problem.prior, rewards, coefficients, problem.alpha, problem.schedule)
    exact = combined_reward(rewards, coefficients)
    experts = ExactExperts(problem.prior, {**rewards, "exact": exact}, problem.alpha, problem.schedule)
    scores = dict(zip(experts.names, experts.predict(problem.x, problem.t, experts.names), strict=True))
    difference = torch.stack([c * scores[name] for name, c in coefficients.items()]).sum(0) - scores["exact"]
    tolerance = 1e-10 * float(torch.stack(list(scores.values())).abs().max())
    error = blend_error(*arguments, problem.x, problem.t)
    torch.testing.assert_close(error, difference, rtol=0, atol=tolerance)
    x = problem.x.clone().requires_grad_(True)
    potential = blend_potential(*arguments, x, problem.t)
    (gradient,) = torch.autograd.grad(potential.sum(), x)
    torch.testing.assert_close(gradient, difference, rtol=0, atol=tolerance)
    assert problem.kl_scale > 1 or float(potential.detach().min()) > -1e-12


@pytest.mark.parametrize("dim", [1, 2])
def test_potential_equals_bayes_rule(dim: int) -> None:
    """G for a quadratic reward beside one with no closed form, against posterior expectations on a lattice."""
    prior, x, schedule, t, alpha = (
        random_mixture(2, dim, seeded(dim)),
        normal((1, dim), seeded(3)),
        VPLinear(),
        0.3,
        0.7,
    )
    rewards: dict[str, Reward] = {"q": random_reward(dim, alpha, seeded(2)), "sine": SINE}
    coefficients = {"base": 0.2, "q": 0.5, "sine": 0.3}
    nodes = lattice([prior.posterior(schedule, x, t)], spacing=0.3)
    log_weights = log_posterior(prior, schedule, x[0], t, nodes)

    def log_expectation(reward: Reward) -> Tensor:
        return (log_weights + reward(nodes) / alpha).logsumexp(0)

    exact = sum(coefficients[name] * log_expectation(reward) for name, reward in rewards.items())
    exact = exact - log_expectation(combined_reward(rewards, coefficients))
    got = blend_potential(prior, rewards, coefficients, alpha, schedule, x, t)
    torch.testing.assert_close(got[0], exact, rtol=1e-8, atol=1e-9)


def test_potential_on_a_grid() -> None:
    """A prior on a fine grid has the potential of the mixture that it was sampled from, and no series."""
    prior, x = random_mixture(2, 1, seeded(0)), normal((4, 1), seeded(1))
    grid = GridLaw.from_density(prior.log_prob, [-9.0], [9.0], [4001])
    rewards: dict[str, Reward] = {name: random_reward(1, 1.0, seeded(i)) for i, name in enumerate("ab")}
    arguments = (rewards, {"base": 0.2, "a": 0.3, "b": 0.5}, 1.0, VPLinear(), x, 0.4)
    torch.testing.assert_close(
        blend_potential(grid, *arguments), blend_potential(prior, *arguments), rtol=1e-4, atol=1e-6
    )
    with pytest.raises(ValueError, match="got GridLaw"):
        blend_error_series(grid, *arguments)


def test_sign_turns_where_one_coefficient_is_positive() -> None:
    """Hoelder reversed: G < 0 for one reward and lambda > 1, and for one weight above 1 with the other below 0."""
    prior, x = random_mixture(3, 2, seeded(0)), normal((50, 2), seeded(1))
    rewards: dict[str, Reward] = {name: LinearReward(normal((2,), seeded(i))) for i, name in enumerate("ab")}
    for coefficients in ({"base": -0.5, "a": 1.5}, {"a": 1.4, "b": -0.4}, {"base": -0.2, "a": 1.3, "b": -0.1}):
        assert bool((blend_potential(prior, rewards, coefficients, 1.0, VPLinear(), x, 0.4) < 0).all())
    assert bool((blend_potential(prior, rewards, {"a": 0.4, "b": 0.6}, 1.0, VPLinear(), x, 0.4) > 0).all())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_first_term_is_the_pairwise_variances(schedule: NoiseSchedule) -> None:
    """`1/2 grad sum_{i<j} c_i c_j Var(R_i - R_j)` over base and three rewards, by autograd, for lambda 1.3."""
    prior, x, t = random_mixture(3, 2, seeded(0)), normal((4, 2), seeded(1)), 0.3
    rewards: dict[str, Reward] = {f"r{i}": random_reward(2, 1.0, seeded(i)) for i in range(3)}
    coefficients = coefficients_of(Preference({"r0": 0.5, "r1": 0.3, "r2": 0.2}, 1.3))
    vertices = {"base": 0 * rewards["r0"], **rewards}
    points, total = x.clone().requires_grad_(True), torch.zeros(())
    for i, left in enumerate(vertices):
        for right in list(vertices)[:i]:
            difference = vertices[left] + -1 * vertices[right]
            variance = reward_cumulants(prior, difference, 1.0, schedule, points, t, order=2)[1]
            total = total + 0.5 * coefficients[left] * coefficients[right] * variance.sum()
    (gradient,) = torch.autograd.grad(total, points)
    first = blend_error_series(prior, rewards, coefficients, 1.0, schedule, x, t)[0]
    torch.testing.assert_close(first, gradient, rtol=1e-9, atol=1e-10)


def test_quadratic_interpolation_has_no_first_term() -> None:
    """Variances are quadratic in the coefficients: InterpolatedBlend's series starts at alpha^-3, DB's at alpha^-2."""
    prior, x = random_mixture(3, 2, seeded(0)), normal((4, 2), seeded(1))
    a, b = random_reward(2, 1.0, seeded(2)), random_reward(2, 1.0, seeded(3))
    rewards = {"a": a, "b": b, "ab": 0.5 * a + 0.5 * b, "half-a": 0.5 * a, "half-b": 0.5 * b}
    preference = Preference({"a": 0.3, "b": 0.7}, 0.8)
    edges = {("a", "b"): "ab", ("base", "a"): "half-a", ("base", "b"): "half-b"}
    step = Step(0, 1, 0.4, 0.3, torch.zeros(4, dtype=torch.float64))
    shares = {name: float(c) for name, c in InterpolatedBlend(preference, edges).coefficients(step).items()}
    arguments = (1.0, VPLinear(), x, 0.4)
    quadratic = blend_error_series(prior, rewards, shares, *arguments)
    linear = blend_error_series(prior, rewards, coefficients_of(preference), *arguments)
    assert float(quadratic[0].norm() / linear[0].norm()) < 1e-12
    assert float(quadratic[1].norm()) > 1e-3


def test_series_sums_to_the_error_at_large_alpha() -> None:
    """Each further term brings the partial sum nearer, to 1e-6 of the error after the fourth; at alpha = 0.1 the fourth
    is farther off than the first: it diverges there."""
    prior, x = random_mixture(3, 2, seeded(0)), normal((4, 2), seeded(1))
    rewards: dict[str, Reward] = {name: random_reward(2, 0.1, seeded(i)) for i, name in enumerate("ab")}
    coefficients = {"base": 0.2, "a": 0.3, "b": 0.5}

    def distances(alpha: float) -> Tensor:
        arguments = (prior, rewards, coefficients, alpha, VPLinear(), x, 0.4)
        error = blend_error(*arguments)
        return (blend_error_series(*arguments).cumsum(0) - error).norm(dim=(1, 2)) / error.norm()

    near, far = distances(100.0), distances(0.1)
    assert bool((near.diff() < 0).all())
    assert float(near[-1]) < 1e-5
    assert float(far[-1]) > float(far[0])


# Path KL.

LINE = GaussianMixture(*(torch.ones(shape, dtype=torch.float64) for shape in ((1,), (1, 1), (1, 1, 1))))
CURVED = QuadraticReward(torch.tensor([[1.5]]).double(), torch.tensor([1.0]).double())
SLOPE = QuadraticReward(torch.tensor([[-0.2]]).double(), torch.tensor([-1.0]).double())
AFFINE: tuple[Mapping[str, Reward], dict[str, float]] = ({"c": CURVED, "s": SLOPE}, {"base": 0.2, "c": 0.5, "s": 0.3})


def affine_path_kl(schedule: NoiseSchedule) -> float:
    """Of Gaussians: the error of the scores is affine in x, and x is Gaussian under the exact process."""
    rewards, coefficients = AFFINE
    exact = tilt(LINE, combined_reward(rewards, coefficients), 0.5)
    laws = [(c, tilt(LINE, rewards[name], 0.5) if name in rewards else LINE) for name, c in coefficients.items()]
    terms = [(c, float(law.mean), float(law.covariance)) for c, law in [*laws, (-1.0, exact)]]

    def rate(t: float) -> float:
        a, s2 = float(schedule.alpha(t)), float(schedule.variance(t))
        gain = sum(-c / (a**2 * v + s2) for c, _, v in terms)
        pull = sum(c * a * m / (a**2 * v + s2) for c, m, v in terms)
        mean, variance = a * terms[-1][1], a**2 * terms[-1][2] + s2
        return 0.5 * float(schedule.diffusion_squared(t)) * ((gain * mean + pull) ** 2 + gain**2 * variance)

    return integrate.quad(rate, schedule.t_end, schedule.t_start, epsabs=0, epsrel=1e-10, limit=200)[0]


@pytest.mark.parametrize("schedule", [VPLinear(), VE(), RectifiedFlow()], ids=lambda s: type(s).__name__)
def test_path_kl_in_closed_form(schedule: NoiseSchedule) -> None:
    """Gaussian prior and quadratic rewards: the rule in (x, t) against an adaptive integral of a closed form."""
    assert path_kl_on_line(LINE, *AFFINE, 0.5, schedule) == pytest.approx(affine_path_kl(schedule), rel=1e-7)


def test_path_kl_by_particles_is_unbiased() -> None:
    """Within its own standard error of the closed form (1e-5), and 5 % off is caught."""
    mean, error = path_kl(LINE, *AFFINE, 0.5, VPLinear(), 4000, seeded(0))
    exact = affine_path_kl(VPLinear())

    def p_value(expected: float) -> float:
        return float(2 * stats.norm.sf(abs(mean - expected) / error))

    assert not alarms([p_value(exact)])
    assert alarms([p_value(1.05 * exact)])


def test_path_kl_has_converged() -> None:
    """On a mixture of three, twice the nodes in t and in x change nothing beyond 1e-6."""
    prior = random_mixture(3, 1, seeded(0))
    rewards: dict[str, Reward] = {name: random_reward(1, 0.5, seeded(i)) for i, name in enumerate("ab")}
    arguments = (prior, rewards, {"base": 0.1, "a": 0.3, "b": 0.6}, 0.5, VPLinear())
    coarse, fine = path_kl_on_line(*arguments), path_kl_on_line(*arguments, times=64, spacing=0.025)
    assert coarse == pytest.approx(fine, rel=1e-6)


def test_no_error_no_path_kl() -> None:
    """Linear rewards on one Gaussian (MATH.md 5), and a single expert, are blended exactly."""
    linear: dict[str, Reward] = {name: LinearReward(normal((1,), seeded(i))) for i, name in enumerate("ab")}
    assert path_kl_on_line(LINE, linear, {"base": 0.3, "a": 0.5, "b": 0.2}, 0.5, VPLinear()) < 1e-20
    assert path_kl_on_line(LINE, AFFINE[0], {"c": 1.0}, 0.5, VPLinear()) < 1e-20


@pytest.mark.parametrize("coefficients", [{"a": 0.5, "b": 0.4}, {"a": 0.5, "c": 0.5}, {"a": float("nan"), "b": 1.0}])
def test_bad_coefficients(coefficients: dict[str, float]) -> None:
    """Coefficients that do not sum to 1, and names that are not there, are ValueErrors."""
    rewards: dict[str, Reward] = {name: random_reward(1, 0.5, seeded(i)) for i, name in enumerate("ab")}
    for function in (blend_potential, blend_error, blend_error_series):
        with pytest.raises(ValueError, match=r"coefficients must be over .* and sum to 1, received"):
            function(LINE, rewards, coefficients, 0.5, VPLinear(), torch.zeros(2, 1).double(), 0.4)


def test_bad_input() -> None:
    """No rewards, draws or time nodes, too many dimensions and a reward without a closed target are ValueErrors."""
    rewards, coefficients = AFFINE
    for n in (0, 1):
        with pytest.raises(ValueError, match=f"at least two draws, received n = {n}"):
            path_kl(LINE, rewards, coefficients, 0.5, VPLinear(), n, seeded(0))
    with pytest.raises(ValueError, match="coefficients must be over"):
        combined_reward({}, {"base": 1.0})
    with pytest.raises(ValueError, match="at least one node, received 0"):
        path_kl_on_line(LINE, rewards, coefficients, 0.5, VPLinear(), times=0)
    plane = {name: random_reward(2, 0.5, seeded(i)) for i, name in enumerate("ab")}
    with pytest.raises(ValueError, match="one dimension, received 2; use path_kl"):
        path_kl_on_line(random_mixture(2, 2, seeded(0)), plane, {"a": 0.5, "b": 0.5}, 0.5, VPLinear())
    with pytest.raises(ValueError, match="QuadraticReward"):
        path_kl_on_line(LINE, {"sine": SINE}, {"base": 0.5, "sine": 0.5}, 0.5, VPLinear())
