"""Exact moments of the chains: against the sampler itself on basis vectors, over every order of the experts."""

from itertools import product

import pytest
import torch

import toys
from dbtheory import (
    VE,
    ExactExperts,
    GaussianMixture,
    MeanBlend,
    PrecisionBlend,
    Preference,
    QuadraticReward,
    RectifiedFlow,
    SampledBlend,
    VPCosine,
    VPLinear,
    sample,
)
from dbtheory.blend import Step
from dbtheory.moments import affine_step, chain_moments
from dbtheory.sampler import time_grid
from tests.chance import alarms, mean_p_value

SCHEDULES = [VPLinear(), VPCosine(), VE(), RectifiedFlow()]
STEPS = 4


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def gaussian(schedule, kind="score"):
    prior = GaussianMixture(tensor([1.0]), tensor([[1.0, -0.5]]), tensor([[[0.8, 0.3], [0.3, 0.4]]]))
    rewards = {
        "a": QuadraticReward(tensor([[1.0, 0.2], [0.2, 0.1]]), tensor([1.0, 0.0])),
        "b": QuadraticReward(tensor([[-0.1, 0.2], [0.2, 1.0]]), tensor([0.0, -2.0])),
    }
    return ExactExperts(prior, rewards, 1.0, schedule, kind)


class Script:
    """A blender that follows a written order of experts: a name at each step."""

    def __init__(self, names):
        self.names = names

    def __call__(self, experts, x, t, step):
        return experts.predict(x, t, [self.names[step.index]])[0]


def sampled_moments(experts, blender, grid, method):
    """Mean and covariance of the sampler's output where its map is affine in start and noise.

    One row carries the mean, each other row one column of the start's or of a step's noise.
    """
    steps, d = len(grid) - 1, 2
    rows = 1 + d + d * steps
    x_T, noise = torch.zeros(rows, d, dtype=torch.float64), torch.zeros(steps, rows, d, dtype=torch.float64)
    identity = torch.eye(d, dtype=torch.float64)
    x_T[1 : 1 + d] = experts.schedule.sigma(grid[0]) * identity
    for k in range(steps):
        noise[k, 1 + d * (k + 1) : 1 + d * (k + 2)] = identity
    phase = torch.zeros(rows, dtype=torch.float64)
    x = sample(experts, blender, rows, steps, method=method, x_T=x_T, noise=noise, phase=phase, grid=grid)
    columns = x[1:] - x[0]
    return x[0], columns.T @ columns


def mixed(parts, weights):
    """Mean and covariance of a mixture from second moments about the origin."""
    w = torch.as_tensor(weights, dtype=torch.float64)
    means, covariances = (torch.stack(part) for part in zip(*parts, strict=True))
    mean = w @ means
    second = torch.einsum("p,pij->ij", w, covariances + means.unsqueeze(-1) * means.unsqueeze(-2))
    return mean, second - torch.outer(mean, mean)


def assert_moments(law, expected):
    torch.testing.assert_close(law.mean[0], expected[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(law.covariance[0], expected[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["ddpm", "euler"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_mean_chain_is_the_samplers(schedule, method):
    """For MeanBlend, lambda 0.8 and 1.3, constant and changing: the sampler's own map, in any parametrisation."""
    grid = time_grid(schedule, STEPS, power=1.5)
    changing = Preference({"a": lambda p: 0.2 + 0.5 * p, "b": lambda p: 0.8 - 0.5 * p}, lambda p: 0.5 + p)
    for preference in (Preference({"a": 0.3, "b": 0.7}, 0.8), Preference({"a": 0.3, "b": 0.7}, 1.3), changing):
        blend = MeanBlend(preference)
        law = chain_moments(blend, gaussian(schedule), grid, method=method)
        assert_moments(law, sampled_moments(gaussian(schedule, "x0"), blend, grid, method))


@pytest.mark.parametrize("method", ["ddpm", "euler"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_iid_draws_against_every_order_of_the_experts(schedule, method):
    """The recursion is the mixture over all 81 orders, each run through the sampler, weighted by its probability."""
    experts, grid, law = gaussian(schedule), time_grid(schedule, STEPS, power=1.5), {"base": 0.2, "a": 0.24, "b": 0.56}
    orders = list(product(law, repeat=STEPS))
    parts = [sampled_moments(experts, Script(order), grid, method) for order in orders]
    weights = [torch.tensor([law[name] for name in order], dtype=torch.float64).prod() for order in orders]
    blend = SampledBlend(Preference({"a": 0.3, "b": 0.7}, 0.8), "iid")
    assert_moments(chain_moments(blend, experts, grid, method=method), mixed(parts, weights))


@pytest.mark.parametrize("share", ["sample", "batch"])
@pytest.mark.parametrize("method", ["ddpm", "euler"])
def test_the_low_discrepancy_order_against_every_phase(method, share):
    """With w = 0.3 the order is constant for phases in [j/10, (j + 1)/10): ten runs of the sampler give the law."""
    schedule = VPLinear()
    experts, grid = gaussian(schedule), time_grid(schedule, 12, power=1.5)
    w = Preference({"a": 0.3, "b": 0.7})
    orders = [
        [["a", "b"][int(SampledBlend(w).choose([0.3, 0.7], step))] for step in steps_at((j + 0.5) / 10, 12)]
        for j in range(10)
    ]
    assert len({tuple(order) for order in orders}) == 10
    parts = [sampled_moments(experts, Script(order), grid, method) for order in orders]
    law = chain_moments(SampledBlend(w, share=share), experts, grid, method=method)
    assert_moments(law, mixed(parts, [0.1] * 10))


def steps_at(phase, count):
    return [Step(k, count, 0.4, 0.3, tensor([phase])) for k in range(count)]


@pytest.mark.parametrize("order", ["iid", "low-discrepancy"])
def test_particles_have_these_moments(order):
    """Forty thousand samples agree in mean and second moments at 1e-5; other weights' law alarms (control).

    The preference changes with progress, so that the shipped draws replay their history.
    """
    schedule, steps, n = VPLinear(), 8, 40_000
    experts, grid = gaussian(schedule), time_grid(schedule, steps)
    preference = Preference({"a": lambda p: 0.2 + 0.6 * p, "b": lambda p: 0.8 - 0.6 * p})
    x = sample(experts, SampledBlend(preference, order), n, steps, torch.Generator().manual_seed(0), grid=grid)

    def p_values(blender):
        law = chain_moments(blender, experts, grid)
        offsets = x - law.mean[0]
        pairs = [(0, 0), (0, 1), (1, 1)]
        second = [mean_p_value(offsets[:, i] * offsets[:, j], float(law.covariance[0, i, j])) for i, j in pairs]
        return [mean_p_value(offsets[:, i], 0.0) for i in (0, 1)] + second

    assert not alarms(p_values(SampledBlend(preference, order)))
    assert alarms(p_values(SampledBlend(Preference({"a": 0.45, "b": 0.55}), order)))


def test_excess_of_one_step_is_the_spread_of_the_scores():
    """One iid step from a known x adds `h^2 g^4 Cov_c(score_i)` to the covariance (MATH.md 6)."""
    schedule, t, s = VPLinear(), tensor(0.5), tensor(0.45)
    experts, c = gaussian(schedule), tensor([0.2, 0.24, 0.56])
    x = tensor([[0.7, -1.2]])
    step = affine_step(experts, t, s, "euler")
    means = (step.matrices @ x[0]) + step.shifts
    excess = torch.cov(means.T, aweights=c, correction=0)
    scores = experts.predict(x, 0.5, list(experts.names))[:, 0]
    formula = (0.05 * schedule.diffusion_squared(0.5)) ** 2 * torch.cov(scores.T, aweights=c, correction=0)
    torch.testing.assert_close(excess, formula, rtol=1e-12, atol=0)


def test_bad_input():
    """Experts that are no Gaussians, other blenders and methods, three experts in rotation: ValueErrors."""
    schedule, toy = VPLinear(), toys.get("ring-of-six")
    experts, grid, halves = gaussian(schedule), time_grid(schedule, 3), Preference({"a": 0.5, "b": 0.5})
    mixture = ExactExperts(toy.prior, toy.rewards, toy.alpha, toy.schedule)
    with pytest.raises(ValueError, match="need Gaussian experts"):
        chain_moments(MeanBlend(Preference({"east": 0.5, "north": 0.5})), mixture, grid)
    with pytest.raises(ValueError, match="exist for MeanBlend and SampledBlend, got PrecisionBlend"):
        chain_moments(PrecisionBlend(halves, dict.fromkeys(experts.names, 1.0)), experts, grid)
    with pytest.raises(ValueError, match='methods "ddpm" and "euler", got \'ddim\''):
        chain_moments(MeanBlend(halves), experts, grid, method="ddim")
    with pytest.raises(ValueError, match="for two experts, got 3; use iid"):
        chain_moments(SampledBlend(Preference({"a": 0.5, "b": 0.5}, 0.5)), experts, grid)
    with pytest.raises(ValueError, match=r"the lowest weight is -0\.5; use MeanBlend"):
        chain_moments(SampledBlend(Preference({"a": 0.5, "b": 0.5}, lambda p: 0.5 + p), "iid"), experts, grid)
    with pytest.raises(ValueError, match="must not differ between samples"):
        chain_moments(MeanBlend(Preference({"a": 0.5, "b": 0.5}, tensor([0.5, 1.0]))), experts, grid)
    with pytest.raises(ValueError, match="no weight for expert"):
        chain_moments(MeanBlend(Preference({"a": 1.0})), experts, grid)
