"""The table of methods: each is what it says, and refuses what it cannot do."""

import pytest
import torch

import toys
from dbtheory import MeanBlend, Preference, tilt
from toys.methods import METHODS, draw, judge, run
from toys.network import Training
from toys.problem import Budget, Problem
from toys.soup import train_experts
from toys.sweeps import two_rewards

SMALL = Budget(samples=50, steps=8)
MEDIUM = Budget(samples=4000, steps=60)
EXACT_METHODS = [name for name in METHODS if name not in ("network-db", "soup")]
AFFINE = [name for name in EXACT_METHODS if name != "msdda"]  # MSDDA has steps of its own


@pytest.fixture(scope="module")
def networks():
    toy = toys.get("ring-of-six")
    targets = {name: tilt(toy.prior, toy.rewards[name], toy.alpha) for name in two_rewards(toy)}
    return train_experts(toy.prior, targets, toy.schedule, Training(width=8, base_steps=20, expert_steps=20, batch=32))


def problem(weights=None, kl_scale=1.0, name="ring-of-six", **options):
    toy = toys.get(name)
    first, second = two_rewards(toy)
    return Problem(toy, weights or {first: 0.3, second: 0.7}, kl_scale, **options)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_draws(networks, name):
    """Finite samples of the right shape, the same for the same seed and others for another."""
    case = problem(networks=networks)
    first, again = (draw(name, case, SMALL) for _ in range(2))
    assert first.shape == (50, 2)
    assert bool(first.isfinite().all())
    assert torch.equal(first, again)
    assert not torch.equal(first, draw(name, case, Budget(50, 8, seed=1)))


@pytest.mark.parametrize("name", AFFINE)
def test_one_hot_methods_are_the_expert(name):
    """At a vertex of the simplex all of them run the expert of that reward, to rounding."""
    case = problem({"east": 1.0, "north": 0.0})
    single = run(case.experts(), MeanBlend(Preference({"east": 1.0, "north": 0.0})), SMALL)
    assert torch.allclose(draw(name, case, SMALL), single, atol=1e-9)


def test_interpolation_is_exact_at_its_nodes():
    """At w = 1/2 and at lambda = 1/2 the interpolated blends are the middle's expert: the exact drift."""
    for case in (problem({"east": 0.5, "north": 0.5}), problem({"east": 1.0}, kl_scale=0.5)):
        exact = draw("exact", case, SMALL)
        for name in ("quadratic", "piecewise", "corrected-quadratic"):
            assert torch.allclose(draw(name, case, SMALL), exact, atol=1e-9)
        assert not torch.allclose(draw("db", case, SMALL), exact, atol=1e-3)


def test_networks_are_used_by_their_own_methods_alone(networks):
    """With networks that are hardly trained, soup and blend of networks are bad, and the others unmoved."""
    with_them, without = problem(networks=networks), problem()
    assert torch.equal(draw("db", with_them, SMALL), draw("db", without, SMALL))
    judged = judge(with_them, ("db", "network-db", "soup"), Budget(500, 20))
    assert min(judged.errors["network-db"], judged.errors["soup"]) > 2 * judged.errors["db"]


def test_distances_see_what_is_known():
    """On the ring the exact drift is near the floor, plain DB several times above it, and the correction near it."""
    errors = judge(problem({"east": 0.5, "north": 0.5}), ("exact", "db", "corrected"), MEDIUM).errors
    assert errors["exact"] < 2 * errors["floor"]
    assert errors["corrected"] < 2 * errors["floor"]
    assert errors["db"] > 3 * max(errors["exact"], errors["corrected"])


def test_a_refusal_is_told_and_the_others_go_on():
    """Where lambda > 1 no expert can be drawn by chance: None, with the reason, ticks all the same."""
    ticks = []
    judged = judge(problem(kl_scale=1.5), ("ls", "db", "piecewise"), SMALL, lambda: ticks.append(1))
    assert judged.errors["ls"] is judged.errors["piecewise"] is None
    assert judged.errors["db"] > 0
    assert "probabilities" in judged.refused["ls"]
    assert "one edge" in judged.refused["piecewise"]
    assert len(ticks) == 3


def test_methods_refuse_what_they_cannot_do():
    """An unknown name, exact kernels of a law on a grid, and a soup without networks are ValueErrors."""
    with pytest.raises(ValueError, match="choose among exact, db"):
        draw("magic", problem(), SMALL)
    with pytest.raises(ValueError, match="need Gaussian mixtures"):
        draw("msdda", problem(name="checkerboard"), SMALL)
    with pytest.raises(ValueError, match="needs networks"):
        draw("soup", problem(), SMALL)


def test_midpoints_lie_between_vertices_in_use():
    """Edges without a coefficient at one end need no further expert."""
    assert problem({"east": 1.0}, kl_scale=1.0).midpoints == {}
    assert set(problem().midpoints) == {("east", "north")}
    assert set(problem(kl_scale=0.5).midpoints) == {("base", "east"), ("base", "north"), ("east", "north")}
