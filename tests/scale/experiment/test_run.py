"""A run makes what the config says, loses nothing when it fails, and goes on as if it had not."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scale.experiment import make, recorder, store
from scale.experiment import run as running
from scale.experiment.cells import plan
from scale.experiment.config import Config, read_config
from scale.experiment.estimate import rows_an_image
from scale.experiment.run import Stopped, sweep
from scale.experiment.store import load
from scale.rewards import load_scorer
from scale.rewards.colorfulness import Colorfulness
from tests.scale.experiment.fixtures import contents, write_config

REWARDS = ("colorfulness", "jpeg")


def test_the_table_says_what_the_images_are(finished: Path) -> None:
    """30 rows; rewards are those of the files; weighted rewards and costs are what the cells ask for."""
    what, frame = load(finished)
    assert (what["missing"], len(frame), what["rewards"]) == (0, 30, ["colorfulness", "jpeg"])
    assert frame["seed"].tolist() == [0, 1, 1000, 1001, 2000, 2001] * 5
    assert frame["label"].tolist() == ["base"] * 6 + ["mpa"] * 12 + ["mpa-ls"] * 12
    evaluations = frame.groupby("label")["evaluations"].unique().to_dict()
    assert {label: list(rows) for label, rows in evaluations.items()} == {"base": [2], "mpa": [4], "mpa-ls": [2]}
    scorers = {name: load_scorer(name) for name in REWARDS}
    for row in frame.to_dict("records"):
        image = torch.from_numpy(np.array(Image.open(finished / row["file"]))).permute(2, 0, 1)[None] / 255
        for name, scorer in scorers.items():
            assert row[f"reward.{name}"] == float(scorer.score(image, [row["prompt"]]))
    known = frame[frame["label"] != "base"]
    weighted = sum(known[f"weight.{name}"] * known[f"reward.{name}"] for name in scorers)
    assert np.array_equal(known["weighted"], weighted)
    assert frame[frame["label"] == "base"][["weighted", "kl_scale", "weight.jpeg", "certificate"]].isna().all(axis=None)
    assert frame[frame["label"] == "mpa"][["certificate", "disagreement", "ess", "log_weight"]].notna().all(axis=None)


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """The system refuses files of more bytes, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fail_at(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, call: int, instead: Any) -> None:
    """The `call`-th use of a function does something else."""
    calls, real = [0], getattr(where, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return (instead if calls[0] == call else real)(*args, **kwargs)

    monkeypatch.setattr(where, name, counted)


def assert_resumes(config: Config, run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something was kept, nothing half-made is there, and the run ends as it should."""
    monkeypatch.undo()
    assert 0 < len(load(run)[1]) < 30
    assert not list(run.rglob(".*"))
    sweep(config, run)
    assert contents(run) == contents(finished)


@pytest.mark.parametrize("name", ["_write_png", "_write_json"])
def test_a_full_disk_keeps_the_rest(
    config: Config, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """OSError where the system refuses an image or a record (here: by its size); the run can go on."""
    write = getattr(store, name)

    def refuse(*args: Any) -> None:
        with small_files(64):
            write(*args)

    fail_at(monkeypatch, store, name, 9, refuse)
    with pytest.raises(OSError, match="File too large"):
        sweep(config, tmp_path)
    assert_resumes(config, tmp_path, finished, monkeypatch)


def crash(*_: Any) -> None:
    raise RuntimeError("the weights are gone")


def answer_nan(_: Any, images: torch.Tensor, prompts: Any) -> torch.Tensor:
    return torch.full((len(images),), float("nan"))


@pytest.mark.parametrize(
    ("instead", "reason"), [(crash, "colorfulness.*the weights are gone"), (answer_nan, "colorfulness.*NaN")]
)
def test_a_scorer_that_fails_is_named(
    config: Config, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instead: Any, reason: str
) -> None:
    """A crash and NaN alike: ValueError with its name, what was finished stays, and the run can go on."""
    fail_at(monkeypatch, Colorfulness, "_score", 6, instead)
    with pytest.raises(ValueError, match=reason):
        sweep(config, tmp_path)
    assert_resumes(config, tmp_path, finished, monkeypatch)


def test_an_interrupted_run_says_what_is_done(
    config: Config, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C: what was made is still scored and written, and counted in the message."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    fail_at(monkeypatch, make.Maker, "make", 5, interrupt)
    with pytest.raises(Stopped, match="8 of the 30 images"):
        sweep(config, tmp_path)
    assert len(load(tmp_path)[1]) == 8
    assert_resumes(config, tmp_path, finished, monkeypatch)


@pytest.mark.parametrize("method", ["mpa", {"method": "code", "candidates": 2, "block": 1}])
def test_at_most_two_batches_wait(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str | dict[str, Any]
) -> None:
    """The next are made while these are scored, also where they ask the scorers; but no more than two wait."""
    waiting, submit = [], recorder.Recorder.submit

    def watch(self: recorder.Recorder, *args: Any) -> None:
        submit(self, *args)
        waiting.append(len(self._pending))

    monkeypatch.setattr(recorder.Recorder, "submit", watch)
    sweep(read_config(str(write_config(files, "waiting", methods=[method]))), tmp_path)
    assert waiting == [1, 2, 2, 2, 2, 2]


def test_steered_methods_run_beside_the_blends(files: Path, tmp_path: Path) -> None:
    """CoDe scores its candidates, RGG takes gradients, and both are in the ledger; jpeg has no gradient: nothing."""
    methods = [{"method": "code", "candidates": 2, "block": 1}, {"method": "rgg", "alpha": 0.5}]
    one = {"preferences": [{"colorfulness": 1.0}], "methods": methods}
    sweep(read_config(str(write_config(files, "steered", **one))), tmp_path)
    _, frame = load(tmp_path)
    code, rgg = (frame[frame["method"] == name] for name in ("code", "rgg"))
    assert (code["reward_calls"] > 0).all()
    assert (code["gradients"] == 0).all()
    assert (rgg["gradients"] > 0).all()
    refused = write_config(files, "refused", methods=methods[1:])
    with pytest.raises(
        ValueError, match=r"nothing to make: .*rgg needs the gradient of its rewards, and jpeg has none"
    ):
        sweep(read_config(str(refused)), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(("changes", "reason"), [({"eta": 0.0}, "eta > 0"), ({"scheduler": "euler"}, "DDIM")])
def test_steered_methods_are_refused_before_the_others_work(
    files: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    """They stand last in the config, and would be refused after hours."""
    methods = ["base", {"method": "code", "candidates": 2, "block": 1}]
    with pytest.raises(ValueError, match=reason):
        sweep(read_config(str(write_config(files, "steered", methods=methods, **changes))), tmp_path)
    assert not (tmp_path / "images").exists()


def test_best_of_n_needs_no_noise(files: Path, tmp_path: Path) -> None:
    """The candidates of its one block begin apart, so eta = 0 is refused for smaller blocks alone."""
    methods = [{"method": "code", "candidates": 2, "block": 2}]
    assert sweep(read_config(str(write_config(files, "best", methods=methods, eta=0.0))), tmp_path, limit=2).made


def test_no_method_s_images_are_censored_or_marked(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steered methods decode by themselves, without a safety checker; one that blackens the rest would bias them."""
    pipe = make.open_pipeline(config.model or "")
    pipe.safety_checker = pipe.watermark = torch.nn.Identity()  # pyright: ignore
    monkeypatch.setattr(make, "open_pipeline", lambda *_: pipe)
    maker = make.Maker(config, ())
    assert maker.pipe.safety_checker is None
    assert maker.pipe.watermark is None


def test_processes_that_do_not_share_the_folder_are_told(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the images would pass for all."""
    work = running._work
    monkeypatch.setattr(running, "_work", lambda mine, *rest: work(mine[::2], *rest))
    with pytest.raises(ValueError, match="one folder that they share"):
        sweep(config, tmp_path)
    assert not (tmp_path / "results.parquet").exists()


def test_every_blend_runs(files: Path, tmp_path: Path) -> None:
    """All methods of one sweep, attached one after the other, each with its options; labels tell them apart."""
    both = str(files / "both")
    experts = [{"weights": {"colorfulness": 0.4, "jpeg": 0.6}, "adapter": both}]
    methods = [
        {"method": "mpa-held", "exact": 0.5}, {"method": "msdda", "variances": dict.fromkeys(("base", *REWARDS), 1.5)},
        {"method": "interp", "midpoints": {"colorfulness+jpeg": both}}, "rs", "rs-factors", "base",
        {"method": "morl", "experts": experts}, {"method": "kla", "preferences": [{"jpeg": 1}], "lambdas": [1.5]},
        {"method": "mpa", "correct": "resample"}, {"method": "mpa-ls", "order": "iid"},
    ]  # fmt: skip
    path = write_config(files, "every", methods=methods, preferences={"w": [0.4]}, prompt_limit=1)
    sweep(read_config(str(path)), tmp_path)
    what, frame = load(tmp_path)
    assert what["missing"] == 0
    assert frame["label"].nunique() == 10
    assert frame.groupby("label")["sha256"].nunique().eq(2).all()
    assert frame["sha256"].nunique() == 20
    records = [json.loads(path.read_text()) for path in (tmp_path / "records").glob("*.json")]
    assert {len(record["made_by"]["adapters"]) for record in records} == {0, 1, 2, 3}


def test_the_estimate_counts_what_runs_spend(files: Path, tmp_path: Path) -> None:
    """Rows through the denoiser; the base model's too where lambda leaves it a weight, and only there."""
    variances = dict.fromkeys(("base", *REWARDS), 1.5)
    methods = [
        "base", "mpa", "mpa-ls", {"method": "mpa-held", "exact": 0.5, "label": "held"}, "rs",
        {"method": "msdda", "variances": variances, "label": "msdda"},
        {"method": "code", "candidates": 3, "block": 2, "lambdas": [1], "label": "code"},
    ]  # fmt: skip
    once = {"prompt_limit": 1, "seeds": 1, "steps": 4, "lambdas": [1, 0.5], "preferences": {"w": [0.4]}}
    config = read_config(str(write_config(files, "rows", methods=methods, **once)))
    sweep(config, tmp_path)
    spent = {(row["label"], row["kl_scale"]): row["evaluations"] for row in load(tmp_path)[1].to_dict("records")}
    told = {(cell.label, cell.kl_scale): rows_an_image(cell, 4) for cell in plan(config)[0] if cell.label != "base"}
    assert {key: rows for key, rows in spent.items() if key[0] != "base"} == told
    assert [told["msdda", scale] for scale in (1, 0.5)] == [told["mpa", scale] for scale in (1, 0.5)] == [8, 12]
