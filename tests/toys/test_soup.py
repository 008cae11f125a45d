"""Score networks, their training and their soup."""

import pytest
import torch

import toys
from dbtheory import ExactExperts, MeanBlend, Preference, VPLinear, sample, tilt
from tests import conformance
from toys.network import Training, evaluate, fit, initial_state
from toys.soup import SOUP, NetworkExperts, average, fine_tune, train_base, train_experts

D = torch.float64
SCHEDULE = VPLinear()
SHORT = Training(width=32, base_steps=1500, expert_steps=300, batch=256, rate=5e-3, expert_rate=2e-3)


@pytest.fixture(scope="module")
def toy():
    return toys.get("two-modes")


@pytest.fixture(scope="module")
def networks(toy):
    targets = {name: tilt(toy.prior, toy.rewards[name], toy.alpha) for name in ("right", "left")}
    return train_experts(toy.prior, targets, toy.schedule, SHORT)


def noised(toy, law, t):
    generator = torch.Generator().manual_seed(3)
    clean = law.sample(2000, generator=generator)
    noise = torch.randn(clean.shape, generator=generator, dtype=D)
    return toy.schedule.alpha(t) * clean + toy.schedule.sigma(t) * noise


@pytest.mark.parametrize("name", ["base", "right", "left"])
def test_training_learns_the_exact_noise_prediction(toy, networks, name):
    """A few hundred steps bring each network near its own law's noise prediction; fresh weights are far from it."""
    exact = ExactExperts(toy.prior, {k: toy.rewards[k] for k in ("right", "left")}, toy.alpha, SCHEDULE, "eps")
    fresh = NetworkExperts({"base": initial_state(1, SHORT)}, SCHEDULE)
    for t in (0.1, 0.4, 0.8):
        x = noised(toy, exact.targets[name], t)
        truth = exact.predict(x, t, [name])[0]
        assert float((networks.predict(x, t, [name])[0] - truth).square().mean().sqrt()) < 0.15
        assert float((fresh.predict(x, t, ["base"])[0] - truth).square().mean().sqrt()) > 0.3


def test_networks_are_experts(networks):
    """They pass the suite that every kind of experts passes."""
    x = torch.linspace(-2, 2, 5, dtype=D).unsqueeze(-1)
    conformance.check_all(networks, x, 0.4)
    conformance.check_all(networks, x, torch.tensor(1e-6, dtype=D))


def test_one_hot_soups_are_the_networks(networks):
    """A soup of one network is that network bit for bit, also the base by lambda = 0."""
    x = torch.linspace(-2, 2, 7, dtype=D).unsqueeze(-1)
    for weights, kl_scale, name in (
        ({"right": 1.0, "left": 0.0}, 1.0, "right"),
        ({"right": 0.0, "left": 1.0}, 1.0, "left"),
        ({"right": 0.5, "left": 0.5}, 0.0, "base"),
    ):
        soup = networks.soup(Preference(weights, kl_scale=kl_scale).coefficients())
        assert torch.equal(soup.predict(x, 0.3, [SOUP]), networks.predict(x, 0.3, [name]))


def test_a_soup_of_identical_networks_is_that_network(networks):
    """Equal weights average to themselves, whatever the coefficients (lambda > 1 too)."""
    state = networks.states["right"]
    same = NetworkExperts({"base": state, "right": state, "left": state}, SCHEDULE)
    soup = same.soup(Preference({"right": 0.3, "left": 0.7}, kl_scale=1.6).coefficients())
    x = torch.linspace(-2, 2, 7, dtype=D).unsqueeze(-1)
    assert torch.allclose(soup.predict(x, 0.3, [SOUP]), same.predict(x, 0.3, ["right"]), rtol=0, atol=1e-12)


def test_a_soup_is_the_blend_of_linear_networks_only(networks):
    """Averaging weights and averaging predictions agree for the last layer, and differ for whole networks."""
    coefficients = Preference({"right": 0.5, "left": 0.5}).coefficients()
    x = torch.linspace(-2, 2, 7, dtype=D).unsqueeze(-1)
    blend = networks.predict(x, 0.3, ["right", "left"]).mean(0)
    assert not torch.allclose(networks.soup(coefficients).predict(x, 0.3, [SOUP])[0], blend, atol=1e-3)
    base = networks.states["base"]
    heads = {
        name: base | {layer: networks.states[name][layer] for layer in ("layers.6.weight", "layers.6.bias")}
        for name in ("right", "left")
    }
    linear = NetworkExperts({"base": base} | heads, SCHEDULE)
    mean = linear.predict(x, 0.3, ["right", "left"]).mean(0)
    assert torch.allclose(linear.soup(coefficients).predict(x, 0.3, [SOUP])[0], mean, rtol=0, atol=1e-12)


def test_training_depends_on_the_seed_alone(toy):
    """The same seed gives the same weights, another seed others; the global generator is neither used nor moved."""
    tiny = Training(width=8, base_steps=5, expert_steps=5, batch=16)
    state = torch.random.get_rng_state()
    first, again = (train_base(toy.prior, SCHEDULE, tiny) for _ in range(2))
    other = train_base(toy.prior, SCHEDULE, Training(width=8, base_steps=5, batch=16, seed=1))
    assert all(torch.equal(first[layer], again[layer]) for layer in first)
    assert not any(torch.equal(first[layer], other[layer]) for layer in first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_networks_trained_together_are_those_trained_alone(toy):
    """An ensemble shares times and noise, not gradients: each member is what it would be on its own."""
    tiny = Training(width=8)
    starts = [initial_state(1, tiny), initial_state(1, Training(width=8, seed=1))]
    draws = torch.stack([toy.prior.sample(100, torch.Generator().manual_seed(k)) for k in (0, 1)])

    def trained(which):
        generator = torch.Generator().manual_seed(2)
        return fit([starts[k] for k in which], draws[which], SCHEDULE, 20, 32, 1e-2, generator)

    together, alone = trained([0, 1]), [trained([0])[0], trained([1])[0]]
    x, t = torch.linspace(-2, 2, 9).unsqueeze(-1), torch.full((9,), 0.3)
    for one, other, start in zip(together, alone, starts, strict=True):
        assert torch.allclose(evaluate(one, x, t), evaluate(other, x, t), atol=1e-4)
        assert not torch.allclose(evaluate(one, x, t), evaluate(start, x, t), atol=1e-2)


def test_fine_tuning_starts_from_the_base(toy):
    """Without a step of training every expert is the base itself: the soup's networks share their origin."""
    base = initial_state(1, Training(width=8))
    experts = fine_tune(base, [toy.prior, toy.prior], SCHEDULE, Training(width=8, expert_steps=0))
    assert all(torch.equal(expert[layer], base[layer]) for expert in experts for layer in base)


def test_networks_can_be_sampled(networks):
    """A blend of networks runs in the ordinary sampler and ends near the targets' support."""
    x = sample(networks, MeanBlend(Preference({"right": 1.0, "left": 0.0})), 200, 30, torch.Generator().manual_seed(0))
    assert x.dtype == D
    assert 1.0 < float(x.mean()) < 2.5


def test_bad_soups_are_refused(networks):
    """States without a base first, and coefficients of unknown networks, are ValueErrors that say what is there."""
    with pytest.raises(ValueError, match='"base" first'):
        NetworkExperts({"right": networks.states["right"]}, SCHEDULE)
    with pytest.raises(ValueError, match="no such networks"):
        networks.soup({"base": 0.5, "up": 0.5})


def test_average_leaves_its_inputs_alone(networks):
    """Averaging makes new weights: the experts stay what they were."""
    before = {layer: weight.clone() for layer, weight in networks.states["right"].items()}
    average(networks.states, {"right": 0.5, "left": 0.5})
    assert all(torch.equal(networks.states["right"][layer], before[layer]) for layer in before)
