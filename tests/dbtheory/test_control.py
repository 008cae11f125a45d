"""Control, Jensen control and gap: three routes that agree, Bayes' rule for any reward, extremes, bad
input."""

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor

from dbtheory.conditional import Conditional
from dbtheory.control import chosen_route, control, jensen_control, jensen_gap, log_expectation
from dbtheory.grid import GridLaw
from dbtheory.mixture import GaussianMixture
from dbtheory.reward import FunctionReward, LinearReward, QuadraticReward, SmoothReward
from dbtheory.schedule import NoiseSchedule, RectifiedFlow, VPLinear
from tests.dbtheory.bayes import Bayes
from tests.dbtheory.strategies import SCHEDULES, normal, random_mixture, random_reward

QUANTITIES = (control, jensen_control, jensen_gap)
each_quantity = pytest.mark.parametrize("quantity", QUANTITIES, ids=lambda q: q.__name__)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


SMOOTH = SmoothReward(lambda x: x.sum(-1))
GRID = GridLaw.from_density(lambda x: -0.5 * x.square().sum(-1), (-5, -5), (5, 5), (21, 21))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def largest_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


@each_quantity
@each_schedule
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_three_routes_agree(quantity: Callable[..., Tensor], schedule: NoiseSchedule, dim: int) -> None:
    """Closed form, Gauss-Hermite and autograd, one time for all points or one each, alpha 0.5 and 0.01."""
    prior = random_mixture(3, dim, seeded(dim))
    x = prior.noised(schedule, 0.5).sample(4, seeded(9))
    for alpha, t in ((0.5, 0.3), (0.01, torch.tensor([0.05, 0.3, 0.6, 0.9]).double())):
        reward = random_reward(dim, alpha, seeded(2))
        arguments = (prior, reward, alpha, schedule, x, t)
        closed = quantity(*arguments, route="closed")
        assert closed.shape == x.shape
        # The rule is exact for e^R times a polynomial of degree 1 and for R times one: order 3 is enough.
        assert largest_error(quantity(*arguments, route="quadrature", order=3), closed) < 1e-9
        assert largest_error(quantity(*arguments, route="autograd"), closed) < 1e-9


@pytest.mark.parametrize("route", ["quadrature", "autograd"])
@each_quantity
@pytest.mark.parametrize("dim", [1, 2])
def test_any_reward_equals_bayes_rule(quantity: Callable[..., Tensor], route: str, dim: int) -> None:
    """A reward with no closed form, by Gauss-Hermite of order 64, against Bayes' rule on a lattice."""
    prior, reward = random_mixture(2, dim, seeded(dim)), FunctionReward(lambda x: x.sin().sum(-1))
    x, alpha, t, schedule = normal((1, dim), seeded(3)), 0.7, 0.2, VPLinear()
    got = quantity(prior, reward, alpha, schedule, x, t, route=route, order=64)
    # e^R bends faster than the posterior does, so the lattice must be finer than the posterior asks for.
    bayes = Bayes(prior, schedule, x[0], t, [prior.posterior(schedule, x, t)], spacing=0.3)
    expected = getattr(bayes, quantity.__name__)(reward, alpha)
    torch.testing.assert_close(got[0], expected, rtol=1e-9, atol=1e-10)


@each_quantity
def test_quadratic_in_disguise(quantity: Callable[..., Tensor]) -> None:
    """A quadratic reward given as a plain function: the plain rule converges to the closed form."""
    prior, reward = random_mixture(2, 2, seeded(0)), random_reward(2, 1.0, seeded(1))
    disguised, x = FunctionReward(lambda x: reward(x)), normal((3, 2), seeded(2))
    closed = quantity(prior, reward, 1.0, VPLinear(), x, 0.2)
    for route in ("quadrature", "autograd"):
        got = quantity(prior, disguised, 1.0, VPLinear(), x, 0.2, route=route, order=48)
        torch.testing.assert_close(got, closed, rtol=1e-8, atol=1e-9)


def test_linear_reward_on_a_gaussian_has_no_gap() -> None:
    """Gaussian prior, linear reward: log E[e^R|x] - E[R|x] does not depend on x, at any time (MATH.md 5)."""
    prior = GaussianMixture(torch.ones(1).double(), torch.zeros(1, 1).double(), torch.ones(1, 1, 1).double())
    reward, x = LinearReward(torch.tensor([2.0]).double()), torch.linspace(-3, 3, 7).double()[:, None]
    for t in (0.05, 0.5, 1.0):
        assert jensen_gap(prior, reward, 1.0, VPLinear(), x, t).abs().max() < 1e-14
        assert control(prior, reward, 1.0, VPLinear(), x, t).abs().min() > 1e-3


def test_control_tends_to_the_reward_gradient_at_the_data() -> None:
    """As t -> 0 the control tends to grad R and the gap to 0."""
    prior, reward, x = (
        random_mixture(3, 2, seeded(0)),
        random_reward(2, 0.5, seeded(1)),
        normal((4, 2), seeded(2)),
    )
    slope = reward.gradient(x) / 0.5
    for schedule in SCHEDULES:
        torch.testing.assert_close(control(prior, reward, 0.5, schedule, x, 1e-7), slope, rtol=1e-3, atol=1e-3)
        assert jensen_gap(prior, reward, 0.5, schedule, x, 1e-7).abs().max() < 1e-3


# Extremes, on a line, in 80 digits.

MEANS, VARIANCE, Q, B = (-2.0, 1.0, 3.0), 0.5, 1.5, 0.7


def line_problem() -> tuple[GaussianMixture, QuadraticReward]:
    prior = GaussianMixture(
        torch.full((3,), 1 / 3, dtype=torch.float64),
        torch.tensor(MEANS, dtype=torch.float64)[:, None],
        torch.full((3, 1, 1), VARIANCE, dtype=torch.float64),
    )
    return prior, QuadraticReward(torch.tensor([[Q]]).double(), torch.tensor([B], dtype=torch.float64))


def exact(alpha: float, schedule: NoiseSchedule, x: float, t: float) -> dict[str, mpmath.mpf]:
    """u and ubar as derivatives in x of log E[e^R|x] and E[R|x], differentiated numerically in 80 digits."""
    a, s2 = mpmath.mpf(schedule.alpha(t).item()), mpmath.mpf(schedule.variance(t).item())
    q, b, c = mpmath.mpf(Q) / mpmath.mpf(alpha), mpmath.mpf(B) / mpmath.mpf(alpha), mpmath.mpf(VARIANCE)
    spread = 1 / (1 / c + a**2 / s2)  # the posterior's variance in each component

    def components(point: mpmath.mpf) -> list[tuple[mpmath.mpf, mpmath.mpf]]:
        marginal = a**2 * c + s2
        return [
            (mpmath.exp(-((point - a * m) ** 2) / (2 * marginal)), spread * (m / c + a * point / s2)) for m in MEANS
        ]

    def log_expectation(point: mpmath.mpf) -> mpmath.mpf:
        precision = 1 / spread + q
        parts = components(point)
        masses = [w * mpmath.exp((m / spread + b) ** 2 / (2 * precision) - m**2 / (2 * spread)) for w, m in parts]
        return mpmath.log(mpmath.fsum(masses) / mpmath.fsum(w for w, _ in parts))

    def expectation(point: mpmath.mpf) -> mpmath.mpf:
        parts = components(point)
        values = [w * (b * m - q * (m**2 + spread) / 2) for w, m in parts]
        return mpmath.fsum(values) / mpmath.fsum(w for w, _ in parts)

    u, ubar = mpmath.diff(log_expectation, mpmath.mpf(x)), mpmath.diff(expectation, mpmath.mpf(x))
    return {"control": u, "jensen_control": ubar, "jensen_gap": u - ubar}


@pytest.mark.parametrize("route", ["closed", "quadrature", "autograd"])
@pytest.mark.parametrize("schedule", [VPLinear(), RectifiedFlow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("alpha", [0.01, 1.0])
@pytest.mark.parametrize("t", [1e-5, 0.5, 0.99])
@pytest.mark.parametrize("x", [-1e3, 0.1, 1e3])
def test_extremes_in_high_precision(route: str, schedule: NoiseSchedule, alpha: float, t: float, x: float) -> None:
    """A thousand standard deviations out, next to the data and at alpha = 0.01: 1e-8 of the largest."""
    prior, reward = line_problem()
    with mpmath.workdps(80):
        expected = {name: float(value) for name, value in exact(alpha, schedule, x, t).items()}
    largest = max(abs(value) for value in expected.values())
    for quantity in QUANTITIES:
        point = torch.tensor([[x]], dtype=torch.float64)
        got = quantity(prior, reward, alpha, schedule, point, t, route=route).item()
        assert got == pytest.approx(expected[quantity.__name__], rel=0, abs=1e-8 * largest)


@each_quantity
def test_float32(quantity: Callable[..., Tensor]) -> None:
    """A single-precision prior gives a single-precision answer by every route."""
    prior, reward, x = (
        random_mixture(3, 2, seeded(0)),
        random_reward(2, 0.5, seeded(1)),
        normal((4, 2), seeded(2)),
    )
    expected = quantity(prior, reward, 0.5, VPLinear(), x, 0.3)
    for route in ("closed", "quadrature", "autograd"):
        got = quantity(prior.to(torch.float32), reward, 0.5, VPLinear(), x.float(), 0.3, route=route)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)


@each_quantity
def test_the_route_follows_from_the_reward(quantity: Callable[..., Tensor]) -> None:
    """Left open it is closed for a quadratic reward, Gauss-Hermite for a smooth one, a lattice for any other."""
    prior, quadratic, x = random_mixture(2, 2, seeded(0)), random_reward(2, 0.5, seeded(1)), normal((3, 2), seeded(2))
    for reward, route in (
        (quadratic, "closed"),
        (SmoothReward(lambda x: x.sin().sum(-1)), "quadrature"),
        (FunctionReward(lambda x: x.sign().sum(-1)), "grid"),
        (SmoothReward(lambda x: x.sin().sum(-1)) + FunctionReward(lambda x: x.sign().sum(-1)), "grid"),
    ):
        assert chosen_route(prior, reward) == route
        arguments = (prior, reward, 0.7, VPLinear(), x, 0.3)
        assert torch.equal(quantity(*arguments), quantity(*arguments, route=route))


@each_quantity
def test_chunks_change_nothing(quantity: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Points in pieces of one or two, each with its own time, give what they give together."""
    prior, reward = random_mixture(2, 2, seeded(0)), SmoothReward(lambda x: x.sin().sum(-1))
    x, t = normal((5, 2), seeded(2)), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    together = quantity(prior, reward, 0.7, VPLinear(), x, t, order=8)
    monkeypatch.setattr("dbtheory.conditional._CHUNK_ENTRIES", 2 * 64 * 4)
    torch.testing.assert_close(quantity(prior, reward, 0.7, VPLinear(), x, t, order=8), together, rtol=1e-13, atol=0)


@each_quantity
@pytest.mark.parametrize("route", ["closed", "autograd"])
def test_closed_forms_do_not_pay_for_a_rule(
    quantity: Callable[..., Tensor], route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 points in d = 8 are one chunk or two where the reward is quadratic, whatever the order: they were chunks of
    one point, as if 24^8 nodes had to be summed."""
    prior, reward = random_mixture(2, 8, seeded(0)), random_reward(8, 1.0, seeded(1))
    x, chunks, at = normal((1000, 8), seeded(2)), [], Conditional.at

    def counted(*arguments) -> Conditional:
        chunks.append(len(arguments[4]))
        return at(*arguments)

    monkeypatch.setattr(Conditional, "at", counted)
    got = quantity(prior, reward, 1.0, VPLinear(), x, 0.4, route=route)
    assert len(chunks) <= 2
    few = quantity(prior, reward, 1.0, VPLinear(), x, 0.4, route=route, order=3)
    torch.testing.assert_close(few, got, rtol=0, atol=0)


def test_log_expectation_has_the_control_as_gradient() -> None:
    """Autograd for a closed form and for a rule; a prior on a grid agrees with the mixture that it samples."""
    prior, x = random_mixture(2, 1, seeded(0)), normal((4, 1), seeded(1)).requires_grad_(True)
    # a sine so slow that 24 nodes resolve it to rounding
    for reward in (random_reward(1, 0.7, seeded(2)), SmoothReward(lambda x: (x / 3).sin().sum(-1))):
        values = log_expectation(prior, reward, 0.7, VPLinear(), x, 0.4)
        (gradient,) = torch.autograd.grad(values.sum(), x)
        expected = control(prior, reward, 0.7, VPLinear(), x.detach(), 0.4)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-10)
        grid = GridLaw.from_density(prior.log_prob, [-9.0], [9.0], [4001])
        on_grid = log_expectation(grid, reward, 0.7, VPLinear(), x.detach(), 0.4)
        torch.testing.assert_close(on_grid, values.detach(), rtol=1e-4, atol=1e-5)


@each_quantity
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"t": 0.0}, r"\(0, 1\]"),
        ({"t": math.nan}, r"\[0, 1\]"),
        ({"t": torch.tensor([0.1, 0.2])}, "must be"),
        ({"x": torch.zeros(3, 5)}, "points must be"),
        ({"x": torch.full((3, 2), math.nan)}, "NaN"),
        ({"route": "guess"}, "unknown route 'guess'"),
        ({"reward": LinearReward(torch.ones(3).double())}, "3 coordinates"),
        ({"reward": FunctionReward(lambda x: x.sum(-1)), "route": "closed"}, "QuadraticReward"),
        ({"reward": FunctionReward(lambda x: x.sum(-1)), "prior": random_mixture(2, 3, seeded(0))}, "SmoothReward"),
        ({"reward": SMOOTH, "prior": random_mixture(2, 8, seeded(0)), "x": torch.zeros(3, 8)}, "directions"),
        ({"reward": SmoothReward(lambda z: z.sum(-1), torch.ones(1, 3))}, "3 coordinates"),
        ({"prior": GRID, "route": "quadrature"}, '"grid" alone'),
        ({"prior": GRID, "t": 0.0}, r"\(0, 1\]"),
        (
            {"reward": QuadraticReward(-50 * torch.eye(2).double(), torch.zeros(2).double())},
            "positive definite",
        ),
        ({"route": "quadrature", "order": 0}, "Gauss-Hermite"),
        ({"route": "quadrature", "order": 2_000_000}, "Gauss-Hermite"),
    ],
)
def test_bad_input_is_refused(quantity: Callable[..., Tensor], change: dict, message: str) -> None:
    """Each error names what was wrong, by each of the three functions."""
    arguments = {
        "prior": random_mixture(2, 2, seeded(0)),
        "reward": LinearReward(torch.ones(2).double()),
        "alpha": 1.0,
        "schedule": VPLinear(),
        "x": torch.zeros(3, 2).double(),
        "t": 0.5,
    }
    with pytest.raises(ValueError, match=message):
        quantity(**(arguments | change))


@pytest.mark.parametrize("broken", [lambda x: x.squeeze(-1).log(), lambda x: -1 / (x.squeeze(-1) > 0).to(x)])
def test_a_reward_that_is_not_finite_is_refused(broken):
    """NaN, or minus infinity on half of the line, would come back as NaN from everything but the control."""
    one = torch.ones(1, dtype=torch.float64)
    prior = GaussianMixture(one, 0 * one[None], one[None, None])
    for function in (control, jensen_control, jensen_gap):
        with pytest.raises(ValueError, match="NaN or infinite"):
            function(prior, FunctionReward(broken), 1.0, VPLinear(), one[None], 0.5)
