"""The guide docs/experiments.md: its commands run as printed, its config is read, and it names what there is."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from scale import cli
from scale.experiment.cells import plan
from scale.experiment.config import config_names, read_config
from scale.experiment.entries import NAMES


@pytest.fixture
def text(root: Path) -> str:
    return (root / "docs" / "experiments.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_shell_blocks(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first run, from nothing to its report, on the small world."""
    monkeypatch.chdir(tmp_path)
    lines = "".join(blocks(text, "sh")).splitlines()
    for line in lines:
        command, *arguments = shlex.split(line)
        assert command == "dblend"
        cli.main(arguments)
    assert len(lines) == 2
    assert "| base | w = 0.5 |" in (tmp_path / "out" / "quick" / "report" / "report.md").read_text()


def test_the_config_of_its_reader_is_read(
    text: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With files where it says, the YAML block plans a cell a method and preference."""
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(text, "yaml")
    Path("own.yaml").write_text(block)
    Path("prompts.json").write_text('["a bench"]')
    for place in ("imagereward", "style", "both"):
        shutil.copytree(files / "jpeg", tmp_path / "experts" / place)
    cells, skipped = plan(read_config("own.yaml"))
    assert [cell.label for cell in cells] == [
        "base",
        *["mpa"] * 3,
        *["iid"] * 3,
        *["code"] * 3,
        *["rgg alpha=0.1"] * 3,
        "morl",
    ]
    assert len(skipped) == 2


def test_it_names_what_there_is(text: str) -> None:
    """Its tables hold every method and every config that ships, and no other."""
    names = set(re.findall(r"`([a-z0-9-]+)`", "".join(re.findall(r"^\|([^|]*)\|", text, re.MULTILINE))))
    assert names == {*NAMES, *config_names()} - {"quick"}
