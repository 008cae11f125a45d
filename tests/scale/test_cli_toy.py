"""The command `dblend toy`: the gallery behind it is tested with the toys, here is what a user types and reads."""

import json
from functools import partial
from pathlib import Path

import pytest

from scale.cli import main
from toys import gallery, sweeps
from toys.network import Training


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gallery with few samples, steps and sweeps."""
    training = Training(width=8, base_steps=20, expert_steps=20, batch=16)
    monkeypatch.setattr(sweeps, "ALPHA_FACTORS", (0.5, 2.0))
    monkeypatch.setattr(gallery, "plan", lambda toy, budget, networks=None: [sweeps.alpha_sweep(toy, budget)])
    monkeypatch.setattr(gallery, "run", partial(gallery.run, samples=10, steps=2, training=training))


def test_it_prints_the_distances_and_names_its_files(quick: None, tmp_path: Path, capsys) -> None:
    """A table of every method's distance, why a figure is missing, and figures that exist where it says."""
    main(["toy", "two-modes", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "two-modes: sliced W2 to the target, reward 0.3 right + 0.7 left" in out
    assert "corrected" in out
    assert "no regimes: the angle between two rewards" in out
    written = [line.removeprefix("written: ") for line in out.splitlines() if line.startswith("written: ")]
    assert {Path(file).name for file in written} == {"clouds.png", "errors.png", "toy.json"}
    assert all(Path(file).is_file() for file in written)


def test_json_is_all_that_it_prints(quick: None, tmp_path: Path, capsys) -> None:
    """`--json` prints the figures and nothing else."""
    main(["toy", "two-modes", "--out", str(tmp_path), "--json"])
    results = json.loads(capsys.readouterr().out)
    assert results["toy"] == "two-modes"
    assert set(results["clouds"]["errors"]) >= {"floor", "db", "corrected", "soup"}


def test_an_unknown_toy_is_refused_in_one_line(tmp_path: Path, capsys) -> None:
    """Exit code 2, with the names that exist, before any work starts; likewise a file in the place of the folder."""
    (tmp_path / "file").write_text("")
    for arguments, said in (
        (["nonsense"], "ring-of-six"),
        (["two-modes", "--out", str(tmp_path / "file")], "is a file"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["toy", *arguments])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert said in error
        assert len(error.splitlines()) == 1
