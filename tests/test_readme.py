"""The README's code runs as printed: Python blocks in one session, in order; shell blocks through the command."""

import re
import shlex
from pathlib import Path

import pytest

from scale import cli


def _blocks(root: Path, language: str) -> list[str]:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", (root / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert blocks, f"the README has no {language} block"
    return blocks


def test_python_blocks(root: Path, capsys: pytest.CaptureFixture) -> None:
    """They run, and the first one's claim holds: the samples' mean is the target's to what 4,000 samples allow."""
    session: dict = {}
    for block in _blocks(root, "python"):
        exec(compile(block, "README.md", "exec"), session)
    samples, target = session["x"], session["target"]
    error = (samples.mean(0) - target.mean).abs()
    # five standard errors, plus what DB-MPA itself is off by on this problem
    assert bool((error < 5 * target.covariance.diagonal().sqrt() / len(samples) ** 0.5 + 0.05).all())
    assert session["image"].size == (64, 64)
    assert not hasattr(session["pipe"].unet, "peft_config")


def test_shell_blocks(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `dblend` line runs and leaves its record and pictures."""
    monkeypatch.chdir(tmp_path)
    for line in "".join(_blocks(root, "sh")).splitlines():
        command, *arguments = shlex.split(line)
        assert command == "dblend"
        cli.main(arguments)
        out = Path(arguments[arguments.index("--out") + 1])
        assert (out / "generation.json").is_file()
        assert len(list(out.glob("*.png"))) >= 1


def test_it_names_both_commands(root: Path) -> None:
    """The two commands that a newcomer runs are targets of the Makefile."""
    makefile = (root / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in (root / "README.md").read_text()
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
