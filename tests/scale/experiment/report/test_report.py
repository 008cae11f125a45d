"""`dblend report` from a folder to its files: finished or not, one run or several; bad folders are refused."""

import json
from pathlib import Path

import pandas as pd
import pytest

from scale.cli import main
from scale.experiment.config import FIGURES
from scale.experiment.report import FIGURES as DRAWN
from scale.experiment.report import write_report
from scale.experiment.report.frame import load_results, preference_names
from tests.scale.experiment.report.runs import two_rewards, write_run

METHODS = ("mpa", "mpa-ls", "rs", "rs-factors", "morl", "code")
FIRST, SECOND = {"alignment": 1.0, "colorfulness": 0.0}, {"alignment": 0.5, "colorfulness": 0.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return write_run(folder / "a", two_rewards(METHODS), prompts=8, pictures=3)


def test_a_config_may_ask_for_every_figure() -> None:
    """A config is read without what draws: the names that it may give are those that can be drawn."""
    assert set(FIGURES) == set(DRAWN)


def test_everything_is_written(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page, a CSV a table, a PNG a figure, and JSON; what the runs do not have is left out with a reason."""
    main(["report", str(run), "--out", str(tmp_path), "--paper", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == 0
    assert {path.stem for path in tmp_path.glob("*.csv")} == set(found["tables"])
    assert set(found["tables"]) >= {"claims", "means", "gains", "shares", "wins", "hypervolume", "checks", "paper"}
    assert set(found["figures"]) == {"pareto.png", "weighted.png", "certificate.png", "sheet.png"}
    assert all((tmp_path / name).stat().st_size > 5000 for name in found["figures"])
    assert set(found["left_out"]) == {"lambda", "rewards-count"}
    page = (tmp_path / "report.md").read_text()
    assert "seeds of one prompt are not independent" in page
    assert "compare signs and order, not sizes" in page
    assert page.count("![") == 4
    means = pd.read_csv(tmp_path / "means.csv")
    assert {"weighted", "weighted low", "weighted high"} <= set(means.columns)
    checks = pd.read_csv(tmp_path / "checks.csv").set_index("label")
    assert checks.loc["base", "counting"] == 1.0


def test_the_summary_speaks_of_claims(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json: the claims, and where the report is: in the run's folder. Only the config's figures are drawn."""
    run = write_run(tmp_path / "a", two_rewards(("mpa", "rs")), prompts=8, figures=["pareto"])
    main(["report", str(run)])
    text = capsys.readouterr().out
    assert "reproduced  DB-MPA above rs, at 1 of 1" in text
    assert f"written: {run}/report/report.md" in text
    assert [path.name for path in (run / "report").glob("*.png")] == ["pareto.png"]


def test_an_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    """Two cells of 16 images without records: the rest is reported, and the page says so."""
    run = write_run(tmp_path / "a", two_rewards(("mpa", "rs")), prompts=8, unmade=2, figures=["weighted"])
    found = write_report([run], tmp_path / "out")
    assert found["missing"] == 32
    assert "Unfinished: 32 images" in (tmp_path / "out" / "report.md").read_text()


def test_runs_go_together(tmp_path: Path) -> None:
    """A second run's lambdas join the first run's base; the lambda figure appears."""
    run = write_run(tmp_path / "a", two_rewards(("mpa",)), prompts=8, figures=["lambda"])
    cells = [(method, FIRST, scale) for method in ("kla", "morl") for scale in (0.5, 1.5)]
    other = write_run(tmp_path / "b", cells, prompts=8)
    found = write_report([run, other], tmp_path / "out")
    assert "lambda.png" in found["figures"]
    assert len(found["tables"]["lambdas"]) == 2


def test_more_rewards_have_their_figure(tmp_path: Path) -> None:
    """Two and three rewards of one weight: the rewards-count figure, and no Pareto figure of two axes."""
    names = ("a", "b", "c")
    uniform = [{name: (k < n) / n for k, name in enumerate(names)} for n in (2, 3)]
    cells = [("base", dict.fromkeys(names, 0.0), 1.0), *(("mpa", weights, 1.0) for weights in uniform)]
    found = write_report([write_run(tmp_path / "a", cells, rewards=names)], tmp_path / "out")
    assert {"rewards-count.png", "weighted.png"} <= set(found["figures"])
    assert "takes two rewards" in found["left_out"]["pareto"]


def test_the_same_images_twice_count_once(run: Path, tmp_path: Path) -> None:
    """A run beside itself is itself; a run that made other images under the same names is refused."""
    assert len(load_results([run, run]).frame) == len(load_results([run]).frame)
    other = write_run(tmp_path / "b", [("mpa", SECOND, 1.0)], prompts=8)
    with pytest.raises(ValueError, match=r"two runs made different images of mpa, w = 0\.5"):
        load_results([run, other])


def test_bad_folders_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No folder, one that is no run, one without images, runs of other rewards or steps, an output that is a file."""
    with pytest.raises(ValueError, match="give the folder of a run"):
        load_results([])
    with pytest.raises(ValueError, match=r"run\.json"):
        load_results([tmp_path])
    with pytest.raises(ValueError, match="no finished image"):
        load_results([write_run(tmp_path / "none", two_rewards(("mpa",)), prompts=2, unmade=4)])
    names = ("jpeg", "symmetry")
    with pytest.raises(ValueError, match="different rewards"):
        load_results([run, write_run(tmp_path / "b", [("mpa", {"jpeg": 1.0, "symmetry": 0.0}, 1.0)], rewards=names)])
    with pytest.raises(ValueError, match="different steps"):
        load_results([run, write_run(tmp_path / "c", [("mpa", SECOND, 1.0)], steps=50)])
    with pytest.raises(ValueError, match="different adapters"):
        load_results([run, write_run(tmp_path / "d", [("mpa", SECOND, 1.0)], adapters={"alignment": "1f"})])
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="is a file"):
        write_report([run], file)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_an_earlier_report_left_is_removed(tmp_path: Path) -> None:
    """The tables and figures that this report has not are gone; what is not ours stays."""
    out = tmp_path / "out"
    write_report([write_run(tmp_path / "a", two_rewards(("mpa", "morl")), prompts=4)], out, beside_paper=True)
    (out / "notes.csv").write_text("mine")
    assert {"shares.csv", "paper.csv", "pareto.png"} <= {path.name for path in out.iterdir()}
    found = write_report([write_run(tmp_path / "b", two_rewards(("mpa",)), prompts=4, figures=["weighted"])], out)
    left = {path.name for path in out.iterdir()}
    assert left == {f"{name}.csv" for name in found["tables"]} | {
        "weighted.png",
        "notes.csv",
        "report.md",
        "report.json",
    }
    assert not left & {"shares.csv", "paper.csv", "pareto.png"}


@pytest.mark.parametrize(("figure", "pictures"), [("sheet", 1), ("certificate", 1)])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, figure: str, pictures: int) -> None:
    """The sheet and the checks read images: a broken one is a ValueError with its path."""
    run = write_run(tmp_path / "a", two_rewards(("mpa", "morl")), prompts=2, pictures=pictures, figures=[figure])
    (broken,) = (path for path in (run / "images").iterdir() if path.name.startswith("base"))
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"{broken.name} is no image"):
        write_report([run], tmp_path / "out")


def test_preferences_that_are_close_have_names_of_their_own() -> None:
    """Three digits, and as many more as tell all of them apart."""
    assert preference_names([(0.2, 0.8), (1 / 3, 2 / 3), (0.2, 0.8)]) == ["w = 0.2", "w = 0.333", "w = 0.2"]
    assert preference_names([(0.3333, 0.6667), (0.3334, 0.6666)]) == ["w = 0.3333", "w = 0.3334"]
    assert preference_names([(0.2, 0.3, 0.5)]) == ["0.2 / 0.3 / 0.5"]


def test_an_unknown_figure_is_refused(tmp_path: Path) -> None:
    """A config names a figure that is none: the message lists them."""
    run = write_run(tmp_path / "a", two_rewards(("mpa",)), prompts=2)
    what = json.loads((run / "run.json").read_text()) | {"figures": ["pie"]}
    (run / "run.json").write_text(json.dumps(what))
    with pytest.raises(ValueError, match="no figure pie; they are pareto"):
        write_report([run], tmp_path / "out")


ODD_RECORDS = (
    ("made_by", {"method": "mpa", "weights": [1], "kl_scale": 1.0}),
    ("images", []),
    ("cost", {}),
    ("images", [{"prompt": ["a list"], "seed": 0, "rewards": {}, "certificate": None}]),
)


@pytest.mark.parametrize(("name", "value"), [("identity", None), ("figures", "pareto"), ("jobs", "9"), ("skipped", 3)])
def test_another_program_s_run_is_refused(tmp_path: Path, name: str, value: object) -> None:
    """What run.json lacks or has of another type is one ValueError that names the file and the key."""
    run = write_run(tmp_path / "a", two_rewards(("mpa",)), prompts=2)
    what = json.loads((run / "run.json").read_text()) | {name: value}
    (run / "run.json").write_text(json.dumps(what))
    with pytest.raises(ValueError, match=rf"run\.json .* {name}"):
        load_results([run])


@pytest.mark.parametrize(("name", "value"), ODD_RECORDS)
def test_records_of_another_program_are_refused(tmp_path: Path, name: str, value: object) -> None:
    """A record whose parts have other types, or none, is one ValueError."""
    run = write_run(tmp_path / "a", two_rewards(("mpa",)), prompts=2)
    record = json.loads((run / "records" / "b1.json").read_text()) | {name: value}
    (run / "records" / "b1.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="records that are not of dblend sweep"):
        load_results([run])


def test_prices_and_bars_are_text(tmp_path: Path) -> None:
    """Two dollar signs in a prompt or a name are no formula, and a bar in a name no column."""
    names = ("$\\frac$|a", "b")
    cells = [("base", dict.fromkeys(names, 0.0), 1.0), *(("mpa", {names[0]: w, "b": 1 - w}, 1.0) for w in (0.3, 0.7))]
    run = write_run(tmp_path / "a", cells, rewards=names, prompts=2, figures=["pareto", "weighted"])
    assert write_report([run], tmp_path / "out")["figures"] == ["pareto.png", "weighted.png"]
    page = (tmp_path / "out" / "report.md").read_text()
    header, rule = next(
        pair for pair in zip(page.splitlines(), page.splitlines()[1:], strict=False) if "---" in pair[1]
    )
    assert header.replace("\\|", "").count("|") == rule.count("|")
