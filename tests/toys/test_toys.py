"""The registry of toy problems."""

import pytest
import torch

import toys
from dbtheory import ExactExperts, tilt


def test_the_promised_toys_are_there():
    """At least the five named problems, each with two or three rewards that all live in the prior's space."""
    assert set(toys.names()) >= {"two-modes", "ring-of-six", "grid-of-nine", "anisotropic", "mixture-8d"}
    for name in toys.names():
        toy = toys.get(name)
        x = toy.prior.sample(10, generator=torch.Generator().manual_seed(0))
        assert toy.name == name
        assert 2 <= len(toy.rewards) <= 3
        assert all(reward(x).shape == (10,) for reward in toy.rewards.values())
    assert toys.get("two-modes").prior.mean.shape == (1,)
    assert toys.get("mixture-8d").prior.mean.shape == (8,)


@pytest.mark.parametrize("name", toys.names())
def test_rewards_conflict(name):
    """In each toy some two rewards conflict: the target of one scores lower than the prior on the other."""
    toy = toys.get(name)
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
def test_every_preference_has_a_target(name):
    """Every single reward, and every even mix, has a target; experts can be built from each toy."""
    toy = toys.get(name)
    mix = sum((1 / len(toy.rewards)) * reward for reward in toy.rewards.values())
    assert tilt(toy.prior, mix, toy.alpha).mean.isfinite().all()
    assert ExactExperts(toy.prior, toy.rewards, toy.alpha, toy.schedule).names == ("base", *toy.rewards)


def test_toys_are_fresh_and_reproducible():
    """Two calls give equal problems that share no tensors, random ones included."""
    first, second = toys.get("mixture-8d"), toys.get("mixture-8d")
    assert torch.equal(first.prior.means, second.prior.means)
    assert first.prior.means.data_ptr() != second.prior.means.data_ptr()


def test_unknown_toys_are_refused():
    """An unknown name is a ValueError that lists the known ones."""
    with pytest.raises(ValueError, match="ring-of-six"):
        toys.get("ring")
