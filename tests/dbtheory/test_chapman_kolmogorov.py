"""The law of the one-dimensional chain against every order of the experts, written out, and against samples."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from dbtheory import ExactExperts, GaussianMixture, LinearReward, Preference, QuadraticReward, SampledBlend, VPLinear
from dbtheory import sample as run
from dbtheory.chapman_kolmogorov import chain_densities
from dbtheory.fokker_planck import evolve
from dbtheory.moments import affine_step
from tests.chance import alarms

NODES = torch.linspace(-9, 9, 721, dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.24, 0.56], dtype=torch.float64)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def experts(modes=1):
    means = tensor([[-1.0], [1.0]])[:modes]
    prior = GaussianMixture(torch.ones(modes, dtype=torch.float64) / modes, means, tensor([[[0.2]]] * modes))
    rewards = {"a": LinearReward(tensor([1.5])), "b": QuadraticReward(tensor([[1.0]]), tensor([-1.0]))}
    return ExactExperts(prior, rewards, 1.0, VPLinear())


def law(some, weights, grid, nodes=NODES):
    return chain_densities(lambda x, t: some.predict(x, t, some.names), weights, some.schedule, nodes, grid)


def test_the_law_is_the_mixture_over_every_order_of_the_experts():
    """Gaussian experts: after five steps the density is a mixture of 3^5 Gaussians, to 1e-10 at every node."""
    some, grid = experts(), torch.linspace(0.6, 0.2, 6, dtype=torch.float64)
    steps = [affine_step(some, t, s, "euler") for t, s in pairwise(grid)]
    expected = torch.zeros_like(NODES)
    for order in product(range(3), repeat=5):
        mean, variance, probability = 0.0, float(some.schedule.variance(0.6)), float(WEIGHTS[list(order)].prod())
        for i, step in zip(order, steps, strict=True):
            factor = float(step.matrices[i])
            mean, variance = factor * mean + float(step.shifts[i]), factor**2 * variance + float(step.variance)
        expected += probability * torch.from_numpy(stats.norm.pdf(NODES.numpy(), mean, variance**0.5))
    torch.testing.assert_close(law(some, WEIGHTS, grid)[-1], expected, rtol=0, atol=1e-10)


def test_samples_follow_the_law():
    """Mixture experts: 20,000 samples of the real sampler pass Kolmogorov-Smirnov at 1e-5; other weights alarm."""
    some, grid = experts(modes=2), torch.linspace(1, 0.1, 31, dtype=torch.float64)
    blend = SampledBlend(Preference({"a": 0.3, "b": 0.7}, 0.8), "iid")
    x = run(some, blend, 20_000, 30, torch.Generator().manual_seed(0), method="euler", grid=grid)[:, 0].numpy()

    def p_value(weights):
        density = law(some, weights, grid)[-1].numpy()
        reached = integrate.cumulative_trapezoid(density, NODES.numpy(), initial=0)
        return float(stats.kstest(x, lambda q: np.interp(q, NODES.numpy(), reached)).pvalue)

    assert not alarms([p_value(WEIGHTS)])
    assert alarms([p_value(tensor([0.2, 0.34, 0.46]))])


def test_fine_chains_reach_the_fokker_planck_law():
    """One score, the base's own: the distance to the Fokker-Planck law halves with the step."""
    some = experts(modes=2)
    times = torch.linspace(1, 0.1, 401, dtype=torch.float64)
    limit = evolve(lambda x, t: some.predict(x, t, ["base"])[0], some.schedule, NODES, times)[-1]
    one = torch.ones(1, dtype=torch.float64)

    def distance(steps):
        grid = torch.linspace(1, 0.1, steps + 1, dtype=torch.float64)
        density = chain_densities(lambda x, t: some.predict(x, t, ["base"]), one, some.schedule, NODES, grid)[-1]
        return float(torch.trapezoid((density - limit).abs(), NODES))

    errors = [distance(steps) for steps in (30, 60, 120)]
    assert errors[2] < 0.05
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([2.0, 2.0], abs=0.25)


def test_bad_input():
    """Weights that are no probabilities, nodes that cannot resolve a step or lose the mass: ValueErrors."""
    some, grid = experts(), torch.linspace(0.6, 0.2, 6, dtype=torch.float64)
    for weights in ([0.5, 0.6, -0.1], [0.5, 0.2, 0.2]):
        with pytest.raises(ValueError, match="weights must be probabilities"):
            law(some, tensor(weights), grid)
    with pytest.raises(ValueError, match="spacing 1 must be at most half"):
        law(some, WEIGHTS, grid, torch.linspace(-7, 7, 15, dtype=torch.float64))
    with pytest.raises(ValueError, match="lose the mass"):
        law(some, WEIGHTS, grid, torch.linspace(-2, 2, 161, dtype=torch.float64))
