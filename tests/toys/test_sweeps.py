"""Sweeps, the regime map and the whole gallery, on sizes too small to mean anything but themselves."""

import json
import math
from dataclasses import replace

import pytest
from matplotlib.image import imread

import toys
from toys import gallery, regimes, sweeps
from toys.network import Training, initial_state
from toys.problem import Budget

TINY = Budget(samples=30, steps=3)
QUICK = Training(width=8, base_steps=20, expert_steps=20, batch=16)


@pytest.fixture(scope="module")
def ring():
    return toys.get("ring-of-six")


def test_the_plan_fits_the_toy(ring):
    """A plane has six sweeps, a line five (no angle), and each names as many problems and budgets as values."""
    plane, line = sweeps.plan(ring, TINY), sweeps.plan(toys.get("two-modes"), TINY)
    assert [one.name for one in plane] == ["weight", "kl-scale", "alpha", "steps", "dimension", "conflict"]
    assert [one.name for one in line] == ["weight", "kl-scale", "alpha", "steps", "dimension"]
    for one in (*plane, *line):
        assert len(one.values) == len(one.problems) == len(one.budgets)
        assert one.draws == len(one.values) * len(one.methods)


def test_the_variable_is_what_varies(ring):
    """Along each sweep the problems differ in the variable of its name, and in nothing else."""
    by_name = {one.name: one for one in sweeps.plan(ring, TINY)}
    assert tuple(p.weights["east"] for p in by_name["weight"].problems) == by_name["weight"].values
    assert tuple(p.kl_scale for p in by_name["kl-scale"].problems) == by_name["kl-scale"].values
    assert tuple(p.toy.alpha for p in by_name["alpha"].problems) == by_name["alpha"].values
    assert tuple(float(b.steps) for b in by_name["steps"].budgets) == by_name["steps"].values
    assert tuple(float(p.toy.dim) for p in by_name["dimension"].problems) == by_name["dimension"].values
    assert {p.kl_scale for p in by_name["weight"].problems} == {1.0}
    assert {b for one in by_name.values() if one.name != "steps" for b in one.budgets} == {TINY}


def test_a_sweep_measures_every_method(ring):
    """One number a value and a method, None only where a reason is given, and a tick a draw."""
    whole = sweeps.kl_sweep(ring, TINY)
    some = replace(whole, values=(0.5, 1.5), problems=[whole.problems[2], whole.problems[6]], budgets=[TINY] * 2)
    ticks = []
    table = sweeps.measure(some, lambda: ticks.append(1))
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert set(table["errors"]) == {"floor", *sweeps.SHARED}
    assert all(len(curve) == 2 for curve in table["errors"].values())
    missing = {name for name, curve in table["errors"].items() if None in curve}
    assert missing == set(table["refused"]) == {"ls", "ls-iid"}
    assert len(ticks) == some.draws


def test_the_regime_map_has_a_cell_for_each_pair(ring):
    """Errors by [alpha][angle] for each KL scale and method; where the rewards agree, DB is the exact expert."""
    cells = regimes.Cells(alpha_factors=(0.5, 2.0), angles=(0.0, 90.0, 180.0))
    ticks = []
    table = regimes.regime_map(ring, initial_state(2, QUICK), TINY, QUICK, cells, lambda: ticks.append(1))
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert table["alphas"] == [0.5, 2.0]
    assert [set(layer["errors"]) for layer in table["layers"]] == [{"floor", *m} for m in regimes.METHODS.values()]
    for layer in table["layers"]:
        assert all(len(rows) == 2 and all(len(row) == 3 for row in rows) for rows in layer["errors"].values())
    assert len(ticks) == cells.draws
    first = table["layers"][0]["errors"]
    for row in (0, 1):
        assert first["db"][row][0] == pytest.approx(first["ls"][row][0]) == pytest.approx(first["quadratic"][row][0])


def test_the_winner_is_the_cheapest_of_the_best():
    """The least error wins by a clear margin alone; within a quarter, or below the floor, the cheaper method does."""
    errors = {"floor": [[0.01]], "db": [[0.3]], "ls": [[0.34]], "corrected": [[0.1]], "soup": [[None]]}
    assert regimes.winner(errors, 0, 0) == "corrected"
    assert regimes.winner(errors | {"corrected": [[0.29]]}, 0, 0) == "ls"
    assert regimes.winner(errors | {"floor": [[0.31]]}, 0, 0) == "db"


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    """One small run on a plane, of few values a sweep, with its calls of progress."""
    with pytest.MonkeyPatch.context() as patch:
        for name, values in (("WEIGHTS", (0.0, 0.5)), ("KL_SCALES", (0.5, 1.5)), ("STEPS", (2, 5))):
            patch.setattr(sweeps, name, values)
        for name, values in (("ALPHA_FACTORS", (0.5, 2.0)), ("DIMENSIONS", (1, 3)), ("ANGLES", (0.0, 90.0))):
            patch.setattr(sweeps, name, values)
        yield small_run(tmp_path_factory.mktemp("toy"))


def small_run(out):
    calls = []
    cells = regimes.Cells(alpha_factors=(0.5, 1.0), angles=(0.0, 120.0))
    result = gallery.run(
        "anisotropic",
        out,
        samples=40,
        steps=4,
        training=replace(QUICK, base_steps=130),
        cells=cells,
        progress=lambda *call: calls.append(call),
    )
    return result, calls


def test_the_gallery_writes_its_figures(plane):
    """Three PNG files that open at a size fit for reading and hold more than one colour."""
    result, _ = plane
    assert set(result["figures"]) == {"clouds", "errors", "regimes"}
    assert result["skipped"] == {}
    for path in result["figures"].values():
        picture = imread(path)
        assert 1000 < picture.shape[1] < 3000
        assert 800 < picture.shape[0] < 3000
        assert picture[..., :3].std() > 0.02


def test_the_gallery_returns_what_it_writes(plane):
    """`toy.json` is the result; every number in it is finite."""
    result, _ = plane
    with open(result["json"], encoding="utf-8") as file:
        assert json.load(file) == {key: value for key, value in result.items() if key != "json"}
    assert len(result["sweeps"]) == 6
    assert result["rewards"] == ["saddle", "up"]
    assert {"floor", "soup", "corrected"} <= set(result["clouds"]["errors"])
    assert all(math.isfinite(e) for s in result["sweeps"] for c in s["errors"].values() for e in c if e is not None)


def test_progress_counts_to_its_total(plane):
    """Progress goes up by one and ends at the total that it announced at first."""
    _, calls = plane
    total = calls[0][1]
    assert calls == [(k, total) for k in range(1, total + 1)]


def test_what_cannot_be_drawn_is_skipped(tmp_path, monkeypatch):
    """Eight dimensions have error curves alone, a line no regime map; the reason is told."""
    # one sweep is enough here, and quick
    monkeypatch.setattr(sweeps, "ALPHA_FACTORS", (0.5, 2.0))
    monkeypatch.setattr(gallery, "plan", lambda toy, budget, networks=None: [sweeps.alpha_sweep(toy, budget)])
    high = gallery.run("mixture-8d", tmp_path, samples=10, steps=2, training=QUICK)
    assert set(high["figures"]) == {"errors"}
    assert set(high["skipped"]) == {"clouds", "regimes"}
    assert high["regimes"] is None
    line = gallery.run("two-modes", tmp_path, samples=10, steps=2, training=QUICK)
    assert set(line["figures"]) == {"clouds", "errors"}
    assert {path.name for path in (tmp_path / "two-modes").iterdir()} == {"clouds.png", "errors.png", "toy.json"}


def test_an_unknown_toy_writes_nothing(tmp_path):
    """The name is checked before any work: no folder is left behind."""
    with pytest.raises(ValueError, match="ring-of-six"):
        gallery.run("ring", tmp_path / "out")
    assert not (tmp_path / "out").exists()
