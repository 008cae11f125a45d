"""The Fokker-Planck equation against laws known in closed form: its limit, its order, and what it conserves."""

import math

import pytest
import torch
from scipy import integrate

from dbtheory import VE, GaussianMixture, RectifiedFlow, VPCosine, VPLinear
from dbtheory.fokker_planck import evolve

END = 0.02
CASES = [(VPLinear(), 7.0), (VPCosine(), 7.0), (VE(sigma_max=3.0), 16.0), (RectifiedFlow(), 7.0)]
SCHEDULES = [schedule for schedule, _ in CASES]


def mixture():
    return GaussianMixture(
        torch.tensor([0.4, 0.6], dtype=torch.float64),
        torch.tensor([[-1.5], [1.0]], dtype=torch.float64),
        torch.tensor([[[0.2]], [[0.1]]], dtype=torch.float64),
    )


def score_of(schedule, sign=1.0):
    return lambda x, t: sign * mixture().noised(schedule, t).score(x)


def line(reach, count):
    return torch.linspace(-reach, reach, count + 1, dtype=torch.float64)


def solve(schedule, reach, fineness, score=None):
    """Nodes, and the density at END, on a lattice refined in space and in time alike."""
    nodes = line(reach, 25 * fineness)
    # as many steps where the noise is small as the spacing asks for: even in sqrt(t)
    times = torch.linspace(schedule.t_start**0.5, END**0.5, 8 * fineness + 1, dtype=torch.float64) ** 2
    return nodes, evolve(score or score_of(schedule), schedule, nodes, times)[-1]


def distance(nodes, density, expected):
    return float(torch.trapezoid((density - expected).abs(), nodes))


@pytest.mark.parametrize(("schedule", "reach"), CASES, ids=lambda case: type(case).__name__)
def test_converges_to_the_noised_prior_at_second_order(schedule, reach):
    """With the prior's own score the law near data is the noised prior; the error's fitted order is 2.

    The start differs from the noised prior by the signal left at t_start: that floor is measured and subtracted
    by extrapolation, so that order and limit are separate.
    """
    results = [solve(schedule, reach, fineness) for fineness in (12, 24, 48)]
    nodes, shared = results[0][0], [density[::stride] for (_, density), stride in zip(results, (1, 2, 4), strict=True)]
    first, second = distance(nodes, shared[0], shared[1]), distance(nodes, shared[1], shared[2])
    assert math.log2(first / second) == pytest.approx(2.0, abs=0.2)
    limit = shared[2] + (shared[2] - shared[1]) / 3
    exact = mixture().noised(schedule, END).log_prob(nodes.unsqueeze(-1)).exp()
    floor = float(schedule.alpha(schedule.t_start)) * 1.5 / float(schedule.sigma(schedule.t_start))
    assert distance(nodes, limit, exact) < 1e-3 + floor


def test_the_wrong_sign_has_another_limit():
    """Negative control: the same limit is missed, by far, with the score's sign turned."""
    nodes, density = solve(VPLinear(), 7.0, 32, score_of(VPLinear(), sign=-1.0))
    exact = mixture().noised(VPLinear(), END).log_prob(nodes.unsqueeze(-1)).exp()
    assert distance(nodes, density, exact) > 0.5


@pytest.mark.parametrize("schedule", [VPLinear(), VE(sigma_max=3.0), RectifiedFlow()], ids=lambda s: type(s).__name__)
def test_a_linear_score_against_its_moments(schedule):
    """The score `1/2 - x` belongs to no prior: mean and variance then solve an ordinary equation (scipy)."""

    def slope(t, moments):
        f, g2 = float(schedule.drift_rate(t)), float(schedule.diffusion_squared(t))
        mean, variance = moments
        return [f * mean - g2 * (0.5 - mean), 2 * (f + g2) * variance - g2]

    times = torch.linspace(0.9, 0.05, 401, dtype=torch.float64)
    start = [0.0, float(schedule.variance(0.9))]
    moments = integrate.solve_ivp(slope, (0.9, 0.05), start, rtol=1e-10, atol=1e-12).y[:, -1]
    nodes = line(15.0, 1600)
    density = evolve(lambda x, t: 0.5 - x, schedule, nodes, times)[-1]
    mean = torch.trapezoid(nodes * density, nodes)
    variance = torch.trapezoid((nodes - mean) ** 2 * density, nodes)
    assert [float(mean), float(variance)] == pytest.approx(moments.tolist(), rel=3e-4)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("steps", [1, 7, 200])
def test_mass_and_sign_for_any_step(schedule, steps):
    """However long the steps, mass stays 1 to 1e-12 and no density is negative, on uneven nodes too."""
    nodes = 9 * torch.linspace(-1, 1, 301, dtype=torch.float64) ** 3
    times = torch.linspace(schedule.t_start, schedule.t_end, steps + 1, dtype=torch.float64)
    densities = evolve(score_of(schedule), schedule, nodes, times)
    assert densities.shape == (steps + 1, 301)
    assert float((torch.trapezoid(densities, nodes) - 1).abs().max()) < 1e-12
    assert float(densities.min()) >= 0


def test_uneven_nodes_reach_the_same_law():
    """Crowded nodes give the law of even ones where they resolve it: the widths of cells are right."""
    schedule = VPLinear()
    even = line(7.0, 1600)
    uneven = 7 * torch.sinh(2 * even / 7) / math.sinh(2)
    times = torch.linspace(1.0, END, 201, dtype=torch.float64)
    for nodes in (even, uneven):
        density = evolve(score_of(schedule), schedule, nodes, times)[-1]
        exact = mixture().noised(schedule, END).log_prob(nodes.unsqueeze(-1)).exp()
        assert distance(nodes, density, exact) < 2e-3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nodes": line(1.0, 10).flip(0)}, "nodes must be at least 3 and increase"),
        ({"nodes": line(1.0, 1)}, "nodes must be at least 3 and increase"),
        ({"times": torch.tensor([0.1, 0.9], dtype=torch.float64)}, "times must decrease"),
    ],
)
def test_bad_input(change, said):
    """Nodes that do not increase, times that do not decrease and no sub-steps are ValueErrors."""
    arguments = {"nodes": line(1.0, 10), "times": torch.tensor([0.9, 0.1], dtype=torch.float64)} | change
    with pytest.raises(ValueError, match=said):
        evolve(score_of(VPLinear()), VPLinear(), **arguments)
