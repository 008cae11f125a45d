"""DB-MPA-LS where preferences differ by sample or change with progress, and where a batch shares its draws."""

import pytest
import torch

import toys
from dbtheory import ExactExperts, MeanBlend, Preference, SampledBlend, sample
from dbtheory.blend import Step
from tests.chance import alarms, law_p_value, mean_p_value

ORDERS = ("iid", "low-discrepancy")
N = 50_000


def phases(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ring():
    toy = toys.get("ring-of-six")
    return ExactExperts(toy.prior, toy.rewards, toy.alpha, toy.schedule)


def cloud(n):
    return 2 * torch.randn(n, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def rising():
    """From "north" at noise to "east" at data, with a part of the base that fades."""
    return Preference({"east": lambda p: p, "north": lambda p: 1 - p}, lambda p: 0.7 + 0.3 * p)


def by_sample(n):
    weights = torch.linspace(0, 1, n, dtype=torch.float64)
    return Preference({"east": weights, "north": 1 - weights}, 0.9)


@pytest.mark.parametrize("order", ORDERS)
def test_each_sample_keeps_its_own_preference(order):
    """A batch of preferences gives each sample what it gets alone, over a whole trajectory."""
    experts, n, steps = ring(), 12, 15
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(steps, n, 2, generator=generator, dtype=torch.float64)
    x_T, phase = noise[0].flip(0), phases(n)
    together = sample(experts, SampledBlend(by_sample(n), order), n, steps, x_T=x_T, noise=noise, phase=phase)
    for i in range(n):
        w = i / (n - 1)
        alone = SampledBlend(Preference({"east": w, "north": 1 - w}, 0.9), order)
        one = slice(i, i + 1)
        expected = sample(experts, alone, 1, steps, x_T=x_T[one], noise=noise[:, one], phase=phase[one])
        torch.testing.assert_close(together[one], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("index", [0, 4, 8])
def test_a_preference_that_changes_has_the_mean_blends_mean(order, index):
    """At one point the draws of each step average to MeanBlend's prediction at that progress; another's alarms."""
    experts, x = ring(), cloud(1)
    drawn = SampledBlend(rising(), order)(experts, x.expand(N, 2), 0.4, Step(index, 10, 0.4, 0.3, phases(N)))

    def p_values(at):
        mean = MeanBlend(rising())(experts, x, 0.4, Step(at, 10, 0.4, 0.3, phases(1)))[0]
        return [mean_p_value(drawn[:, axis], float(mean[axis])) for axis in (0, 1)]

    assert not alarms(p_values(index))
    assert alarms(p_values(index + 1))


@pytest.mark.parametrize("order", ORDERS)
def test_functions_that_do_not_change_are_numbers(order):
    """A preference given as constant functions makes the trajectories of the same preference given as numbers."""
    numbers = Preference({"east": 0.3, "north": 0.7}, 0.9)
    functions = Preference({"east": lambda _: 0.3, "north": lambda _: 0.7}, lambda _: 0.9)
    runs = [
        sample(ring(), SampledBlend(preference, order), 40, 12, torch.Generator().manual_seed(0))
        for preference in (numbers, functions)
    ]
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", ORDERS)
def test_an_expert_that_joins_late_leaves_earlier_draws_alone(order):
    """The draws of a step depend on the steps before it, never on what the preference becomes afterwards."""
    x, experts = cloud(500), ring()
    early = Preference({"east": lambda p: 0.4, "north": lambda p: 0.6}, lambda p: 1.0)
    joined = Preference({"east": lambda p: 0.4, "north": lambda p: 0.6}, lambda p: 1.0 if p < 0.6 else 0.5)
    for index in range(5):
        here = Step(index, 10, 0.4, 0.3, phases(500))
        drawn = [SampledBlend(preference, order)(experts, x, 0.4, here) for preference in (early, joined)]
        assert torch.equal(*drawn)


@pytest.mark.parametrize("order", ORDERS)
def test_a_shared_draw_is_one_expert_a_step(order):
    """share="batch": one expert for all at each step, the one that the first sample would draw by itself."""
    preference, experts, x = Preference({"east": 0.3, "north": 0.7}, 0.8), ring(), cloud(30)
    for index in range(10):
        here = Step(index, 10, 0.4, 0.3, phases(30))
        shared = SampledBlend(preference, order, share="batch")(experts, x, 0.4, here)
        each = experts.predict(x, 0.4, list(experts.names))
        used = [i for i in range(3) if torch.allclose(each[i], shared)]
        assert len(used) == 1
        own = SampledBlend(preference, order)(experts, x, 0.4, here)
        torch.testing.assert_close(shared[0], own[0])


@pytest.mark.parametrize("order", ORDERS)
def test_a_shared_draw_keeps_the_law_of_each_sample(order):
    """Over batches the shared draw has the exact law; over the samples of one batch it has not (control)."""
    blend = SampledBlend(Preference({"east": 0.3, "north": 0.7}), order, share="batch")
    law = [0.3, 0.7]
    batches = torch.stack([blend.choose(law, Step(3, 10, 0.4, 0.3, phase)) for phase in phases(20_000).view(-1, 4)])
    assert bool((batches == batches[:, :1]).all())
    assert not alarms([law_p_value(batches[:, 2], law)])
    assert alarms([law_p_value(batches.flatten(), law), law_p_value(batches[:1].expand(5000, -1).flatten(), law)])


def test_bad_input():
    """Negative coefficients at a step, preferences or phases that match no batch, unknown options: ValueErrors."""
    experts, x, here = ring(), cloud(20), Step(9, 10, 0.4, 0.3, phases(20))
    turning = Preference({"east": 0.5, "north": 0.5}, lambda p: 2 * p)
    SampledBlend(turning)(experts, x, 0.4, Step(3, 10, 0.4, 0.3, phases(20)))
    with pytest.raises(ValueError, match=r"base=-1.*use MeanBlend"):
        SampledBlend(turning, "iid")(experts, x, 0.4, here)
    with pytest.raises(ValueError, match=r"base=-0\.5.*use MeanBlend"):
        SampledBlend(Preference({"east": 0.5, "north": 0.5}, torch.tensor([0.5, 1.5, 1.0])))
    with pytest.raises(ValueError, match="one preference a sample: 20 samples, received 7"):
        SampledBlend(by_sample(7))(experts, x, 0.4, here)
    with pytest.raises(ValueError, match="one phase a sample"):
        SampledBlend(rising())(experts, x, 0.4, Step(9, 10, 0.4, 0.3, phases(3)))
    with pytest.raises(ValueError, match="share must be"):
        SampledBlend(rising(), share="image")
