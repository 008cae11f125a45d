"""The registry of toy problems."""

from functools import reduce
from operator import add

import pytest
import torch

import toys
from dbtheory import ExactExperts, GaussianMixture, QuadraticReward, tilt
from dbtheory.grid import GridLaw
from dbtheory.metrics import total_variation
from dbtheory.reward import RBFReward
from toys.dense import along_curves
from toys.families import FIRST, SECOND, conflicting, two_modes_power

EXACT = ("two-modes", "ring-of-six", "grid-of-nine", "anisotropic", "mixture-8d")
DENSE = ("two-moons", "pinwheel", "swiss-roll", "checkerboard")
D = torch.float64


@pytest.fixture(scope="module")
def every():
    """All toys, built once: dense ones measure their own discretisation error."""
    return {name: toys.get(name) for name in toys.names()}


def even_mix(toy):
    return reduce(add, (1 / len(toy.rewards) * reward for reward in toy.rewards.values()))


def test_the_promised_toys_are_there(every):
    """The nine named problems, each with two or three rewards that all live in the prior's space."""
    assert set(every) == {*EXACT, *DENSE}
    for name, toy in every.items():
        x = toy.prior.sample(10, generator=torch.Generator().manual_seed(0))
        assert toy.name == name
        assert 2 <= len(toy.rewards) <= 3
        assert all(reward(x).shape == (10,) for reward in toy.rewards.values())
        assert x.shape == (10, toy.dim)
    assert every["two-modes"].dim == 1
    assert every["mixture-8d"].dim == 8


def test_there_are_rewards_of_every_kind(every):
    """Some reward is quadratic, some smooth and bounded, and some neither."""
    kinds = [reward for toy in every.values() for reward in toy.rewards.values()]
    assert any(isinstance(reward, QuadraticReward) for reward in kinds)
    assert any(isinstance(reward, RBFReward) for reward in kinds)
    assert any(not isinstance(reward, QuadraticReward | RBFReward) for reward in kinds)


@pytest.mark.parametrize("name", toys.names())
def test_rewards_conflict(every, name):
    """In each toy some two rewards conflict: the target of one scores lower than the prior on the other."""
    toy = every[name]
    draw = {key: tilt(toy.prior, reward, toy.alpha) for key, reward in toy.rewards.items()}
    samples = {key: target.sample(4000, generator=torch.Generator().manual_seed(0)) for key, target in draw.items()}
    base = toy.prior.sample(4000, generator=torch.Generator().manual_seed(0))
    assert any(
        float(toy.rewards[other](samples[key]).mean()) < float(toy.rewards[other](base).mean())
        for key in draw
        for other in draw
        if other != key
    )


@pytest.mark.parametrize("name", toys.names())
def test_every_preference_has_a_target(every, name):
    """Every single reward, and every even mix, has a target; experts can be built from each toy."""
    toy = every[name]
    assert tilt(toy.prior, even_mix(toy), toy.alpha).mean.isfinite().all()
    assert ExactExperts(toy.prior, toy.rewards, toy.alpha, toy.schedule).names == ("base", *toy.rewards)


@pytest.mark.parametrize("name", [name for name in toys.names() if name != "mixture-8d"])
def test_densities_integrate_to_one(every, name):
    """By the trapezoid rule, prior and mixed target have mass one."""
    toy = every[name]
    line = torch.linspace(-6, 6, 301, dtype=D)
    points = torch.cartesian_prod(*[line] * toy.dim).reshape(-1, toy.dim)
    for law in (toy.prior, tilt(toy.prior, even_mix(toy), toy.alpha)):
        assert float(law.log_prob(points).exp().sum()) * (12 / 300) ** toy.dim == pytest.approx(1.0, abs=2e-4)


def test_exact_toys_say_so(every):
    """Small mixtures have no discretisation error; dense ones have some, and it is small."""
    assert all(every[name].discretisation_error == 0 for name in EXACT)
    assert all(0 < every[name].discretisation_error < 0.05 for name in DENSE)
    assert isinstance(every["checkerboard"].prior, GridLaw)
    assert all(isinstance(every[name].prior, GaussianMixture) for name in DENSE[:3])


def test_the_discretisation_error_measures_the_distance_to_the_limit():
    """The error falls with the number of pieces, at about its square, and doubling tells most of it."""

    def circle(u):
        return 2 * torch.stack([torch.cos(2 * torch.pi * u), torch.sin(2 * torch.pi * u)], dim=-1)

    box = [-4.0] * 2, [4.0] * 2, [161] * 2
    laws = {pieces: along_curves([circle], pieces, 0.25) for pieces in (8, 16, 32, 128)}
    limit = laws[128]
    errors = {pieces: total_variation(laws[pieces], limit, *box) for pieces in (8, 16, 32)}
    assert errors[8] > 4 * errors[16] > 16 * errors[32]
    for pieces in (8, 16):
        told = total_variation(laws[pieces], laws[2 * pieces], *box)
        assert told == pytest.approx(errors[pieces], rel=0.3)


def test_noisy_curves_have_the_moments_of_the_curve():
    """Mean and covariance are the curve's plus thickness^2 I, for any number of pieces: each piece keeps its own."""

    def line(u):
        return torch.stack([u, 3 * u**2], dim=-1)

    mean = torch.tensor([1 / 2, 1.0], dtype=D)
    within = torch.tensor([[1 / 12, 3 * (1 / 4 - 1 / 6)], [3 * (1 / 4 - 1 / 6), 9 * (1 / 5 - 1 / 9)]], dtype=D)
    for pieces in (1, 3, 10):
        law = along_curves([line], pieces, 0.2)
        assert torch.allclose(law.mean, mean, atol=1e-12)
        assert torch.allclose(law.covariance, within + 0.04 * torch.eye(2, dtype=D), atol=1e-12)


@pytest.mark.parametrize("angle", [0.0, 60.0, 180.0])
def test_conflicting_rewards_stand_at_their_angle(every, angle):
    """The two linear rewards have equal length and the angle between them, and alpha is scaled."""
    toy = conflicting(every["ring-of-six"], angle, scale=0.5)
    first, second = (toy.rewards[name].b for name in (FIRST, SECOND))
    cosine = float(first @ second / (first.norm() * second.norm()))
    assert cosine == pytest.approx(torch.cos(torch.deg2rad(torch.tensor(angle, dtype=D))).item(), abs=1e-12)
    assert float(first.norm()) == pytest.approx(float(second.norm()))
    assert toy.alpha == 0.5 * every["ring-of-six"].alpha
    with pytest.raises(ValueError, match="on a line"):
        conflicting(every["two-modes"], angle)


def test_powers_of_two_modes_are_products():
    """In d dimensions the log density is the sum of those on the line, of prior and of tilt alike."""
    line, cube = two_modes_power(1), two_modes_power(3)
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    for reward in (None, "right", "left"):
        one, three = (t.prior if reward is None else tilt(t.prior, t.rewards[reward], t.alpha) for t in (line, cube))
        expected = sum(one.log_prob(x[:, i : i + 1]) for i in range(3))
        assert torch.allclose(three.log_prob(x), expected, atol=1e-10)


def test_toys_are_fresh_and_reproducible():
    """Two calls give equal problems that share no tensors, random ones included."""
    first, second = toys.get("mixture-8d"), toys.get("mixture-8d")
    assert torch.equal(first.prior.means, second.prior.means)
    assert first.prior.means.data_ptr() != second.prior.means.data_ptr()


def test_unknown_toys_are_refused():
    """An unknown name is a ValueError that lists the known ones."""
    with pytest.raises(ValueError, match="ring-of-six"):
        toys.get("ring")
