"""The rate of the certificate, `1/2 g^2 Var_c(score)`, from predictions of every kind, against quadrature."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import toys
from dbtheory import ExactExperts, GaussianMixture, NoiseSchedule, RectifiedFlow, VPDiscrete, VPLinear, VPTabulated
from dbtheory.blend import combine
from dbtheory.correct import euler_rate, score_variance
from dbtheory.preference import Amount

TABLE = VPTabulated(VPDiscrete().alpha(torch.arange(1, 51, dtype=torch.float64) / 50).square())
# far beyond all modes, and fine against the posterior's width of 0.02 at the least
NODES = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
X = torch.linspace(-2.5, 2.5, 6, dtype=torch.float64)
COEFFICIENTS = {"base": -0.3, "left": 0.9, "right": 0.4}
EACH = {
    "base": torch.linspace(-0.5, 0.5, 6, dtype=torch.float64),
    "left": 0.4,
    "right": 0.6 - torch.linspace(-0.5, 0.5, 6, dtype=torch.float64),
}


def world(schedule: NoiseSchedule, kind: str) -> ExactExperts:
    """Two modes on a line, and an expert for each."""
    toy = toys.get("two-modes")
    right = toy.rewards["right"]
    return ExactExperts(toy.prior, {"left": -1.0 * right, "right": right}, 2.0, schedule, kind)


def data_means(experts: ExactExperts, t: float) -> Tensor:
    """E[x0 | x_t] of every expert at X, (m, n): Bayes' rule on a lattice, from densities at t = 0 alone."""
    alpha, sigma = float(experts.schedule.alpha(t)), float(experts.schedule.sigma(t))
    likelihood = -0.5 * ((X[:, None] - alpha * NODES) / sigma) ** 2
    means = []
    for name in COEFFICIENTS:
        posterior = (experts.targets[name].log_prob(NODES[:, None]) + likelihood).softmax(-1)
        means.append(posterior @ NODES)
    return torch.stack(means)


def spread(values: Tensor, coefficients: Mapping[str, Amount]) -> Tensor:
    """`sum_i c_i |v_i|^2 - |sum_i c_i v_i|^2`, as it is written."""
    c = torch.stack([torch.as_tensor(amount, dtype=torch.float64).expand(len(X)) for amount in coefficients.values()])
    return (c * values**2).sum(0) - (c * values).sum(0) ** 2


def rate(experts: ExactExperts, t: float, dt: float, coefficients: Mapping[str, Amount], dtype=torch.float64) -> Tensor:
    """The certificate's growth over a step, as a sampler computes it from the experts' predictions."""
    c = list(coefficients.values())
    predictions = experts.predict(X[:, None], t, list(coefficients)).to(dtype)
    variance = score_variance(predictions, combine(predictions, c), c, t, experts.schedule, experts.parametrization)
    return 0.5 * euler_rate(experts.schedule, t, t - dt) * variance


def assert_rates_agree(got: Tensor, expected: Tensor, rtol: float) -> None:
    """Relative to the largest of them: signed coefficients may cancel at a point."""
    size = float(expected.abs().max())
    assert size > 0
    torch.testing.assert_close(got, expected, rtol=0, atol=rtol * size)


@pytest.mark.parametrize("coefficients", [COEFFICIENTS, EACH], ids=["one", "each"])
@pytest.mark.parametrize("t", [0.02, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("kind", ["eps", "v", "x0", "score"])
@pytest.mark.parametrize("schedule", [VPLinear(), VPDiscrete(), TABLE], ids=lambda s: type(s).__name__)
def test_variance_preserving(schedule: NoiseSchedule, kind: str, t: float, coefficients: Mapping[str, Amount]) -> None:
    """It is `1/2 beta / sigma^2 Var_c(eps) dt` with `eps = (x - alpha E[x0]) / sigma`, whatever is predicted."""
    experts = world(schedule, kind)
    sigma = schedule.sigma(t)
    eps = (X - schedule.alpha(t) * data_means(experts, t)) / sigma
    beta = -2 * schedule.drift_rate(t)
    expected = 0.5 * beta / sigma**2 * spread(eps, coefficients) * 0.01
    assert_rates_agree(rate(experts, t, 0.01, coefficients), expected, rtol=1e-9)


@pytest.mark.parametrize("coefficients", [COEFFICIENTS, EACH], ids=["one", "each"])
@pytest.mark.parametrize("t", [0.02, 0.3, 0.8, 0.99, 1 - 1e-4, 1 - 1e-6])
@pytest.mark.parametrize("kind", ["flow", "eps", "v", "x0", "score"])
def test_rectified_flow(kind: str, t: float, coefficients: Mapping[str, Amount]) -> None:
    """It is `(1 - t)/t Var_c(u) dt` with `u = (x - E[x0]) / t`, also where g^2 diverges and the scores agree."""
    experts = world(RectifiedFlow(), kind)
    velocities = (X - data_means(experts, t)) / t
    expected = (1 - t) / t * spread(velocities, coefficients) * 0.01
    # what the experts differ by is 1 - t times smaller in a score than in a velocity, hence rounded more
    assert_rates_agree(rate(experts, t, 0.01, coefficients), expected, rtol=1e-9 + 1e-14 / (1 - t))


def test_single_precision_velocities_keep_their_digits_at_the_start_of_a_flow() -> None:
    """Differences come first: float32 velocities, as images have them, give the rate to five digits at 1 - 1e-6."""
    experts, t = world(RectifiedFlow(), "flow"), 1 - 1e-6
    exact = rate(experts, t, 0.01, COEFFICIENTS)
    torch.testing.assert_close(rate(experts, t, 0.01, COEFFICIENTS, torch.float32), exact, rtol=1e-5, atol=0)


def test_one_coefficient_a_sample_is_each_sample_alone() -> None:
    """Tensors (n,) among numbers give each row what its own numbers give; in the wrong row they do not."""
    predictions = torch.randn(3, 6, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    c = list(EACH.values())
    together = score_variance(predictions, combine(predictions, c), c, 0.3, VPLinear(), "eps")
    for row in range(6):
        own = [float(torch.as_tensor(amount, dtype=torch.float64).expand(6)[row]) for amount in c]
        one = predictions[:, row : row + 1]
        alone = score_variance(one, combine(one, own), own, 0.3, VPLinear(), "eps")
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-12, atol=0)
        other = [float(torch.as_tensor(amount, dtype=torch.float64).expand(6)[row - 1]) for amount in c]
        assert (alone - score_variance(one, combine(one, other), other, 0.3, VPLinear(), "eps")).abs().max() > 1e-3


def test_the_lattice_knows_a_gaussian() -> None:
    """The control of the reference itself: for N(m, v) the posterior mean is a textbook's."""
    one = torch.ones(1, dtype=torch.float64)
    experts = world(VPLinear(), "eps")
    experts.targets = dict.fromkeys(experts.targets, GaussianMixture(one, one[None], 0.7 * one[None, None]))
    alpha, sigma = VPLinear().alpha(0.4), VPLinear().sigma(0.4)
    expected = 1 + 0.7 * alpha / (0.7 * alpha**2 + sigma**2) * (X - alpha)
    torch.testing.assert_close(data_means(experts, 0.4)[0], expected, rtol=1e-10, atol=1e-12)
