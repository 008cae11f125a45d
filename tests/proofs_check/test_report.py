"""What `dblend verify` says: every claim, its rows and verdicts, and an exit code that can be trusted."""

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from proofs_check import report
from proofs_check.claim import FAILS, HOLDS, REFUTED, Row
from scale.cli import main

REQUIRED = {
    "proposition-1", "proposition-2", "proposition-3", "lemma-1", "lemma-2-as-printed", "pathwise-lemma",
    "density-lemma", "covariance-bound", "shift-families", "blend-error", "kla-error", "quadratic-interpolation",
    "remark-4", "low-discrepancy", "msdda", "feynman-kac", "stepwise",
}  # fmt: skip


def claim(rows: list[Row]) -> ModuleType:
    module = ModuleType("proofs_check.made_up")
    module.__doc__ = "Up is\nup [of course].\n\nMore words."
    module.__dict__.update(SOURCE="paper eq. 0", check=lambda: iter(rows))
    return module


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Row]], None]:
    """Puts one claim with these rows in the place of all others, run in this process."""

    def put(rows: list[Row]) -> None:
        monkeypatch.setitem(sys.modules, "proofs_check.made_up", claim(rows))
        monkeypatch.setattr(report, "names", lambda: ("made-up",))
        monkeypatch.setattr(report, "run_all", lambda chosen, progress: [report.run(name) for name in chosen])

    return put


def test_all_claims_are_there() -> None:
    """Every claim that the theory rests on has a file."""
    assert set(report.names()) >= REQUIRED


@pytest.mark.parametrize("name", report.names())
def test_claims_state_themselves(name: str) -> None:
    """A claim's docstring states it and its SOURCE says where the paper, or MATH.md, has it."""
    module = importlib.import_module(f"proofs_check.{name.replace('-', '_')}")
    assert len((module.__doc__ or "").split()) > 8
    assert any(word in module.SOURCE for word in ("paper", "MATH.md"))


@pytest.mark.parametrize(
    ("row", "verdict", "margin"),
    [
        (Row("x", 1.0, 4.0), HOLDS, 4.0),
        (Row("x", 4.0, 1.0), FAILS, 0.25),
        (Row("x", 4.0, 1.0, ">="), HOLDS, 4.0),
        (Row("x", 1.0, 4.0, ">="), FAILS, 0.25),
        (Row("x", 4.0, 1.0, ">=", refutes=True), REFUTED, 4.0),
        (Row("x", 1.0, 4.0, ">=", refutes=True), FAILS, 0.25),
        (Row("x", 0.0, 1.0), HOLDS, math.inf),
        (Row("x", 0.0, 0.0), HOLDS, 1.0),
        (Row("x", math.inf, 4.0, ">="), HOLDS, math.inf),
    ],
)
def test_verdicts_and_margins(row: Row, verdict: str, margin: float) -> None:
    """A margin above 1 means met, in either sense; a counterexample that does not refute is a failure."""
    assert row.verdict == verdict
    assert row.margin == margin


def test_nan_meets_nothing() -> None:
    """A computation that broke down can never pass."""
    for sense in ("<=", ">="):
        for refutes in (False, True):
            assert Row("x", math.nan, 1.0, sense, refutes).verdict == FAILS


def test_a_passing_claim_exits_0_and_is_written(made_up: Callable, tmp_path: Path, capsys) -> None:
    """The table, the JSON and the page hold the same row; brackets and the legend survive; infinities stay readable."""
    made_up([Row("one [sic]", 1.0, 4.0), Row("wrong", 9.0, 1.0, ">=", refutes=True), Row("exact", 0.0, 1e-9)])
    main(["verify", "--json", str(tmp_path / "rows.json"), "--html", str(tmp_path / "rows.html")])
    out = capsys.readouterr().out
    assert "made-up (paper eq. 0): Up is up [of course]." in out
    assert "one [sic]" in out
    assert "2 rows hold, 0 fail, 1 refute what is printed" in out
    assert report.LEGEND in out
    first, second, third = json.loads((tmp_path / "rows.json").read_text())["claims"]
    assert {key: first[key] for key in ("name", "statement", "source", "measured", "bound", "margin", "verdict")} == {
        "name": "made-up: one [sic]", "statement": "Up is up [of course].", "source": "paper eq. 0",
        "measured": 1.0, "bound": 4.0, "margin": 4.0, "verdict": HOLDS,
    }  # fmt: skip
    assert second["verdict"] == REFUTED
    assert float(third["margin"]) == math.inf
    page = (tmp_path / "rows.html").read_text()
    assert "one [sic]" in page
    assert report.LEGEND in page


@pytest.mark.parametrize("row", [Row("x", 4.0, 1.0), Row("x", 1.0, 4.0, ">=", refutes=True), Row("x", math.nan, 1.0)])
def test_a_failing_claim_exits_1(made_up: Callable, row: Row, capsys) -> None:
    """The negative control of the whole command: one bad row, or a counterexample that refutes nothing, fails it."""
    made_up([Row("fine", 1.0, 4.0), row])
    with pytest.raises(SystemExit) as ended:
        main(["verify"])
    assert ended.value.code == 1
    assert FAILS in capsys.readouterr().out


def test_a_crash_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim that raises yields a failing row which says what was raised, and the other claims still run."""

    def check():
        yield Row("fine", 1.0, 4.0)
        raise ZeroDivisionError("no such number")

    module = claim([])
    module.__dict__["check"] = check
    monkeypatch.setitem(sys.modules, "proofs_check.made_up", module)
    done = report.run("made-up")
    assert not report.passed([done])
    assert "ZeroDivisionError: no such number" in done.rows[-1].what


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--claim", "nonsense"], "proposition-1"), (["--json", "."], "folder")]
)
def test_bad_input_exits_2(arguments: list[str], said: str, capsys) -> None:
    """An unknown claim or a folder in a file's place ends with one line, before anything is checked."""
    with pytest.raises(SystemExit) as ended:
        main(["verify", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_every_claim_holds(tmp_path: Path, capsys) -> None:
    """`dblend verify`: exit 0, every counterexample refutes, and each claim yields at least one row."""
    main(["verify", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())["claims"]
    assert {row["name"].split(":")[0] for row in rows} == set(report.names())
    assert {row["verdict"] for row in rows} == {HOLDS, REFUTED}
    assert "Stated in the paper, but refuted here" in capsys.readouterr().out
