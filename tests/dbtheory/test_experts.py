"""ExactExperts: the closed-form experts pass the shared suite and equal independently built scores."""

import math

import pytest
import torch
from scipy import integrate

import toys
from dbtheory import ExactExperts, FunctionReward, GaussianMixture, GridLaw, QuadraticReward, SmoothReward, VPLinear
from dbtheory.parametrization import convert
from tests import conformance

KINDS = ("score", "eps", "x0", "v")


def make(name="ring-of-six", kind="score"):
    toy = toys.get(name)
    return ExactExperts(toy.prior, toy.rewards, toy.alpha, toy.schedule, kind)


def points(experts, n=7):
    return 2 * torch.randn(n, *experts.event_shape, generator=torch.Generator().manual_seed(0)).to(experts.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", toys.names())
def test_conformance(name, kind):
    """Every toy's experts pass the suite that diffusers' models pass too, in every parametrisation."""
    experts = make(name, kind)
    conformance.check_all(experts, points(experts), 0.4)
    conformance.check_all(experts, points(experts), torch.tensor(1e-3, dtype=torch.float64))


def test_conformance_in_float32():
    """The same holds in float32, to its own rounding."""
    toy = toys.get("ring-of-six")
    experts = ExactExperts(toy.prior.to(torch.float32), toy.rewards, toy.alpha, toy.schedule, "eps")
    conformance.check_all(experts, points(experts), 0.4)


def any_experts(kind="score", dtype=torch.float64):
    """A mixture on a plane and rewards of every sort: targets are a mixture, and grids."""
    toy = toys.get("ring-of-six")
    first = next(iter(toy.rewards.values()))
    smooth = SmoothReward(lambda x: x.sin().sum(-1))
    rewards = {"quadratic": first, "smooth": smooth, "jump": FunctionReward(lambda x: x[..., 0].sign())}
    return ExactExperts(toy.prior.to(dtype), rewards, 1.0, toy.schedule, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_conformance_with_any_reward(kind):
    """Quadratic, smooth and jumping rewards stand side by side."""
    experts = any_experts(kind)
    assert [type(law) for law in experts.targets.values()] == [GaussianMixture, GaussianMixture, GridLaw, GridLaw]
    conformance.check_all(experts, points(experts), 0.4)
    conformance.check_all(experts, points(experts), torch.tensor(0.01, dtype=torch.float64))


def test_conformance_with_any_reward_in_float32():
    """Grids follow the prior's dtype."""
    experts = any_experts("eps", torch.float32)
    conformance.check_all(experts, points(experts), 0.4)


def test_a_prior_on_a_grid():
    """A density that is no mixture, on a line: an expert's score is that of its tilted, noised density by scipy."""
    prior = GridLaw.from_density(lambda x: -x[:, 0].pow(4) + 2 * x[:, 0].square(), [-3.5], [3.5], [701])
    experts = ExactExperts(prior, {"up": SmoothReward(lambda x: x[..., 0].tanh())}, 0.5, VPLinear())
    conformance.check_all(experts, points(experts), 0.4)
    assert experts.event_shape == (1,)
    t = 0.2
    alpha, sigma = float(experts.schedule.alpha(t)), float(experts.schedule.sigma(t))
    for x in (-1.5, 0.2, 1.1):

        def joint(z, x=x):
            return math.exp(-(z**4) + 2 * z * z + 2 * math.tanh(z) - 0.5 * ((x - alpha * z) / sigma) ** 2)

        mass, _ = integrate.quad(joint, -5, 5, epsabs=1e-12)
        pull, _ = integrate.quad(lambda z, x=x: joint(z, x) * (alpha * z - x) / sigma**2, -5, 5, epsabs=1e-12)
        score = experts.predict(torch.tensor([[x]], dtype=torch.float64), t, ["up"]).item()
        assert score == pytest.approx(pull / mass, abs=1e-6)


def test_one_time_a_point():
    """Times (n,) give each point its own time, in both calls."""
    experts = make()
    x, times = points(experts), torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    names, assignment = list(experts.names), torch.arange(7) % 3
    alone = [experts.predict(x[i : i + 1], float(times[i]), names) for i in range(7)]
    together = experts.predict(x, times, names)
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-11, atol=1e-11)
    gathered = together[assignment, torch.arange(7)]
    torch.testing.assert_close(experts.predict_each(x, times, assignment), gathered, rtol=1e-11, atol=1e-11)


def test_scores_against_autograd_of_a_convolved_quadrature():
    """In 1-D an expert's score is the gradient of the log of a tilted, noised density on a fine grid."""
    toy = toys.get("two-modes")
    experts, t = make("two-modes"), 0.3
    grid = torch.linspace(-9.0, 9.0, 4001, dtype=torch.float64)
    alpha, sigma = toy.schedule.alpha(t), toy.schedule.sigma(t)
    x = torch.linspace(-3, 3, 9, dtype=torch.float64).requires_grad_(True)
    for name, reward in toy.rewards.items():
        log_target = toy.prior.log_prob(grid[:, None]) + reward(grid[:, None]) / toy.alpha
        log_noised = (log_target - 0.5 * ((x[:, None] - alpha * grid) / sigma) ** 2).logsumexp(-1)
        (score,) = torch.autograd.grad(log_noised.sum(), x)
        predicted = experts.predict(x.detach()[:, None], t, [name])[0, :, 0]
        torch.testing.assert_close(predicted, score, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_the_same_prediction(kind):
    """Predictions of every kind are the score, converted."""
    scores, experts = make(), make(kind=kind)
    x = points(experts)
    back = convert(experts.predict(x, 0.3, ["east"])[0], x, 0.3, experts.schedule, kind, "score")
    torch.testing.assert_close(back, scores.predict(x, 0.3, ["east"])[0], rtol=1e-11, atol=1e-11)


def test_bad_input():
    """No rewards, one called base, alpha <= 0, an impossible tilt, an unknown kind: ValueErrors."""
    toy = toys.get("two-modes")
    one = torch.ones(1, dtype=torch.float64)
    explosive = QuadraticReward(-100 * one.diag(), one)
    right = toy.rewards["right"]
    for rewards, alpha, kind, said in [
        ({}, 1.0, "eps", "at least one name"),
        ({"base": right}, 1.0, "eps", "none of them"),
        ({"right": right}, 0.0, "eps", "alpha"),
        ({"right": right}, -1.0, "eps", "alpha"),
        ({"explosive": explosive}, 1.0, "eps", "positive definite"),
        ({"right": right}, 1.0, "velocity", "parametrization must be one of"),
    ]:
        with pytest.raises(ValueError, match=said):
            ExactExperts(toy.prior, rewards, alpha, toy.schedule, kind)
    assert isinstance(toy.prior, GaussianMixture)
