"""The toy half of `dblend demo`."""

import json

import pytest
from matplotlib.image import imread

from toys import demo


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """One small run, with its calls of progress."""
    calls = []
    out = tmp_path_factory.mktemp("demo") / "deep" / "folder"
    table = demo.run(out, samples=1500, steps=40, progress=lambda *call: calls.append(call))
    return table, calls, out


def test_rows_are_complete_and_json(result):
    """A row a weight, a positive distance a method and the floor, all of it JSON."""
    table, _, _ = result
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert [row["w"] for row in table["rows"]] == list(demo.WEIGHTS)
    for row in table["rows"]:
        assert set(row) == {"w", "floor", *demo.METHODS}
        assert all(row[key] > 0 for key in row if key != "w")


def test_one_hot_rows_are_the_expert(result):
    """At w = 0 and w = 1 every method is the expert alone: the distances are equal, not merely close."""
    for row in (result[0]["rows"][0], result[0]["rows"][-1]):
        assert row["exact"] == row["mpa"] == row["mpa-ls"] == row["mpa-ls-iid"]


def test_blending_errs_in_the_middle(result):
    """At w = 1/2 both blends are clearly further from the target than the exact drift (MATH.md 4)."""
    row = result[0]["rows"][2]
    assert row["mpa"] > 1.5 * row["exact"]
    assert row["mpa-ls"] > 1.5 * row["exact"]


def test_progress_counts_to_its_total(result):
    """Progress goes up one step at a time and ends at the total that it announced."""
    _, calls, _ = result
    total = len(demo.WEIGHTS) * len(demo.METHODS) * 40
    assert calls == [(k, total) for k in range(1, total + 1)]


def test_figure_is_written_whole(result):
    """One PNG that opens, of a size fit for reading, and no temporary file beside it."""
    table, _, out = result
    assert [path.name for path in out.iterdir()] == ["toy.png"]
    height, width = imread(table["figure"]).shape[:2]
    assert 1000 < width < 3000
    assert 1000 < height < 3000


def test_a_run_is_reproducible(tmp_path):
    """The same seed gives the same table, another seed another."""
    first, again, other = (demo.run(tmp_path, samples=50, steps=5, seed=seed)["rows"] for seed in (1, 1, 2))
    assert first == again != other


def test_figures_survive_a_failed_write(result, tmp_path, monkeypatch):
    """A write that fails leaves the old figure and no temporary file: readers never see half a picture."""
    from toys import figures

    target = tmp_path / "toy.png"
    target.write_bytes(b"old")
    figure = figures.Figure()
    monkeypatch.setattr(figure, "savefig", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        figures.save(figure, target)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
