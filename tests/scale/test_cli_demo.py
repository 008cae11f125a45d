"""`dblend demo`, both halves made small."""

import json
from functools import partial
from pathlib import Path

import pytest

import toys.demo
from scale import cli
from scale.mini import demo


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples, steps and prompts: the numbers mean nothing, their way through the command does."""
    monkeypatch.setattr(toys.demo, "run", partial(toys.demo.run, samples=200, steps=8))
    monkeypatch.setattr(demo, "run", partial(demo.run, prompts=2))
    monkeypatch.setattr(demo, "STEPS", 4)


def test_it_prints_two_tables_and_where_its_files_lie(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A row a preference in both tables, every reward with its standard error; every file it names exists."""
    cli.main(["demo", "--out", str(tmp_path / "demo")])
    text = capsys.readouterr().out
    results = json.loads((tmp_path / "demo" / "demo.json").read_text())
    for row in results["toy"]["rows"]:
        assert f"{row['mpa']:.3f}" in text
    for row in results["images"]["rows"]:
        mean, error, _ = row["alignment"]
        assert f"{mean:.3f} +- {error:.3f}" in text
    written = [line.removeprefix("written: ") for line in text.splitlines() if line.startswith("written: ")]
    assert sorted(Path(file).name for file in written) == ["contact-sheet.png", "demo.json", "pareto.png", "toy.png"]
    assert all(Path(file).is_file() for file in written)


def test_json_prints_the_same_figures(small: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With --json, standard output is one JSON document with both halves, equal to the file's."""
    cli.main(["demo", "--json", "--out", str(tmp_path)])
    printed = json.loads(capsys.readouterr().out)
    stored = json.loads((tmp_path / "demo.json").read_text())
    assert printed["toy"] == stored["toy"]
    assert printed["images"] == stored["images"]


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Exit code 2 and one line, before any work."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--out", str(tmp_path / "file")])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
