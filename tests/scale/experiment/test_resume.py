"""A folder's second run goes on where the first ended, or is refused because it would be another one."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scale.experiment import make
from scale.experiment.config import Config, read_config
from scale.experiment.run import sweep
from scale.experiment.store import Store, load
from tests.scale.experiment.fixtures import contents, write_config


def pixels(run: Path) -> dict[str, np.ndarray]:
    """Every image by its id, as whole numbers."""
    return {path.stem: np.asarray(Image.open(path)).astype(int) for path in (run / "images").glob("*.png")}


def test_a_resumed_run_is_an_uninterrupted_one(config: Config, finished: Path, tmp_path: Path) -> None:
    """After a limit, lost images and a lost record, the folder is the same; a finished run makes nothing."""
    run = tmp_path / "run"
    assert (first := sweep(config, run, limit=2)).made == 10
    assert load(run)[0]["missing"] == first.total - 10 == 20
    images, records = sorted((run / "images").glob("*")), sorted((run / "records").glob("*"))
    images[3].unlink()
    records[0].unlink()
    (run / "records" / ".killed-abc.json").write_text("{")
    sweep(config, run)
    assert contents(run) == contents(finished)
    again = sweep(config, run, limit=2)
    assert (again.before, again.made, again.total) == (30, 0, 30)


def test_the_comparison_sees_what_depends_on_the_process(
    config: Config, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: where noise depends on how often a process was asked, a resumed run is another one."""
    calls, draw = [0], make.draw

    def stateful(pipe: Any, pictures: Any, **options: Any) -> Any:
        calls[0] += 1
        moved = [make_picture(picture, calls[0]) for picture in pictures]
        return draw(pipe, moved, **options)

    def make_picture(picture: Any, shift: int) -> Any:
        return type(picture)(picture.prompt, picture.index, picture.seed + shift)

    monkeypatch.setattr(make, "draw", stateful)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    sweep(config, whole)
    for limit in (2, None):
        calls[0] = 0
        sweep(config, resumed, limit=limit)
    assert contents(whole).keys() == contents(resumed).keys() == contents(finished).keys()
    assert contents(whole) != contents(resumed)


def test_images_do_not_depend_on_their_batch(files: Path, finished: Path, tmp_path: Path) -> None:
    """Alone, or in other batches and another order of methods: within 1 of 255 of the same image."""
    changes = {"batch_size": 5, "methods": ["mpa-ls", "base", "mpa"]}
    sweep(read_config(str(write_config(files, "batched", **changes))), tmp_path)
    ours, theirs = pixels(tmp_path), pixels(finished)
    assert ours.keys() == theirs.keys()
    assert max(int(np.abs(ours[job] - theirs[job]).max()) for job in ours) <= 1
    jobs = load(finished)[1]["job"]  # a cell has 6, of three prompts and two seeds
    apart = [int(np.abs(ours[a] - ours[b]).max()) for i, (a, b) in enumerate(pairwise(jobs)) if i % 6 < 5]
    assert min(apart) > 1  # the control


def test_a_run_goes_on_in_smaller_batches(files: Path, finished: Path, tmp_path: Path) -> None:
    """As after too little memory: what was made stays as it is, and every image is there once."""
    methods = ["base", "mpa", "mpa-ls"]
    sweep(read_config(str(write_config(files, "wide", batch_size=4, methods=methods))), tmp_path, limit=2)
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*.*") if path.parent != tmp_path}
    lost = load(tmp_path)[1]["file"][0]
    (tmp_path / lost).unlink()  # with its batch's record: all four are made anew
    outcome = sweep(read_config(str(write_config(files, "narrow", batch_size=3))), tmp_path)
    assert (outcome.before, outcome.made, outcome.total) == (16, 14, 30)
    _, frame = load(tmp_path)
    reference = load(finished)[1]
    assert frame["job"].tolist() == reference["job"].tolist()
    ours, theirs = pixels(tmp_path), pixels(finished)
    assert max(int(np.abs(ours[job] - theirs[job]).max()) for job in theirs) <= 1
    kept = [name for name in before if (found := [*tmp_path.rglob(name)]) and found[0].read_bytes() == before[name]]
    assert len(kept) >= 4 * 5  # 16 images and 4 records


def test_another_experiment_is_refused(files: Path, finished: Path) -> None:
    """The message names what differs, before the model is loaded; a title may change."""
    before = contents(finished)
    with pytest.raises(ValueError, match=r"differs in .*steps"):
        sweep(read_config(str(write_config(files, "other", steps=3, methods=["base"]))), finished)
    assert contents(finished) == before
    assert sweep(read_config(str(write_config(files, "retitled", title="T"))), finished).made == 0
    sweep(read_config(str(write_config(files))), finished)


@pytest.mark.parametrize(
    ("method", "change", "differs"),
    [
        ("mpa", "adapter_config.json", "adapters"),
        ("msdda", "README.md", "images"),
        ("mpa", "scheduler_config.json", "model_files, images"),
        ("mpa", "tokenizer_config.json", "model_files, images"),
    ],
)
def test_files_that_changed_since_are_refused(
    files: Path, tmp_path: Path, method: str, change: str, differs: str
) -> None:
    """PEFT's settings, a card's variance, the model's scheduler and tokenizer: half of the images would be others."""
    folder = Path(shutil.copytree(files, tmp_path / "files"))
    places = {"adapter_config.json": "jpeg", "README.md": "jpeg", "scheduler_config.json": "model/scheduler"}
    path = folder / places.get(change, "model/tokenizer") / change
    config = write_config(folder, "changed", methods=[method], prompt_limit=1)
    sweep(read_config(str(config)), tmp_path / "run", limit=1)
    if change == "README.md":
        path.write_text("---\nstep_variance: 2.0\n---\n")
    else:
        old = json.loads(path.read_text()) if path.exists() else {}
        new = {"lora_alpha": 3, "beta_end": 0.02} if path.name != "tokenizer_config.json" else {"model_max_length": 9}
        path.write_text(json.dumps(old | new))
    with pytest.raises(ValueError, match=f"holds a run that differs in {differs};"):
        sweep(read_config(str(config)), tmp_path / "run")


def test_a_second_run_is_refused_while_the_first_lives(config: Config, finished: Path) -> None:
    """One line that says so; the lock is free when its holder is gone."""
    holder = Store(finished)
    holder.claim(alone=True)
    with pytest.raises(ValueError, match="another run is at work"):
        sweep(config, finished)
    holder.release()
    assert sweep(config, finished).made == 0
