"""`dblend sweep`: figures in words and as JSON, and one line with an exit code on anything wrong."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from scale.cli import main
from scale.experiment import make
from scale.rewards.colorfulness import Colorfulness
from tests.scale.experiment.fixtures import save_model, write_config
from tests.scale.test_cli import assert_refused

SMALL: dict[str, Any] = {"methods": ["base", "mpa"], "prompts": ["a red circle"], "preferences": {"w": [0.5]}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a config of two batches, and what is wrong with others."""
    folder = save_model(tmp_path_factory.mktemp("files"))
    (folder / "broken.json").write_text("[")
    write_config(folder, "small", **SMALL)
    write_config(folder, "prompts", prompts=str(folder / "broken.json"))
    write_config(folder, "key", lr=1)
    (folder / "a-file").touch()
    return folder


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default output is below the working directory."""
    monkeypatch.chdir(tmp_path)


def run(files: Path, line: str) -> None:
    main([word.replace("@", f"{files}{os.sep}") for word in line.split()])


def test_a_sweep_and_its_figures(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--dry-run makes nothing and tells 4 images and their 12 evaluations; then they are made, then they are there."""
    run(files, "sweep @small.yaml --dry-run --json --out made")
    figures = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "made").exists()
    assert (figures["images"], figures["left"], figures["evaluations"]) == (4, 4, 12)
    assert figures["seconds"] > 0
    run(files, "sweep @small.yaml --json --out made")
    assert json.loads(capsys.readouterr().out)["made"] == 4
    run(files, "sweep @small.yaml --out made")
    assert "0 images made, 4 were there" in capsys.readouterr().out
    run(files, "sweep @small.yaml --dry-run --out made")
    assert "0 of 4 images are left" in capsys.readouterr().out
    run(files, "sweep @small.yaml --limit 1")
    assert (tmp_path / "out" / "sweep" / "small" / "results.parquet").exists()


REFUSED = {
    "no config": ("sweep", "Required options"),
    "unknown config": ("sweep nothing", "no config 'nothing'"),
    "unknown key": ("sweep @key.yaml", "unknown 'lr'"),
    "broken prompts": ("sweep @prompts.yaml", "broken.json"),
    "no twin": ("sweep @small.yaml --mini", "has no mini"),
    "limit": ("sweep @small.yaml --limit 0", "limit must be at least 1"),
    "a file": ("sweep @small.yaml --out @a-file", "is a file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_one_line(files: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Exit code 2, nothing on standard output, one line on standard error."""
    line, reason = REFUSED[name]
    with pytest.raises(SystemExit) as ended:
        run(files, line)
    assert_refused(capsys, ended.value.code, reason)


def test_a_crashed_scorer_is_one_line(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2 and the scorer's name."""

    def crash(*_: Any) -> None:
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(Colorfulness, "_score", crash)
    with pytest.raises(SystemExit) as ended:
        run(files, "sweep @small.yaml --out crashed")
    assert_refused(capsys, ended.value.code, "the reward colorfulness")


def test_ctrl_c_ends_with_a_summary(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 130, and what is done."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(make.Maker, "make", interrupt)
    with pytest.raises(SystemExit) as ended:
        run(files, "sweep @small.yaml --out stopped")
    assert ended.value.code == 130
    assert "0 of the 4 images" in capsys.readouterr().err
