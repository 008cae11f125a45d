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
from scale.experiment import run as running
from scale.experiment.config import Config, read_config
from scale.experiment.run import sweep
from scale.experiment.store import Store, load
from tests.scale.experiment.fixtures import as_peft, contents, write_config


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
    """In other batches, with fewer rows at once, in another order of methods: within 1 of 255 of the same image."""
    code = {"method": "code", "candidates": 3, "block": 1}
    rgg = {"method": "rgg", "alpha": 0.5, "preferences": [{"colorfulness": 1}]}
    sweep(read_config(str(write_config(files, "steered", methods=[code, rgg]))), tmp_path / "steered")
    fewer = [rgg | {"max_rows": 1}, code | {"max_rows": 4}]
    changes = {"batch_size": 5, "methods": [*fewer, "mpa-ls", "base", "mpa"]}
    sweep(read_config(str(write_config(files, "batched", **changes))), tmp_path / "run")
    ours, theirs = pixels(tmp_path / "run"), pixels(finished) | pixels(tmp_path / "steered")
    assert ours.keys() == theirs.keys()
    assert len(ours) == 30 + 18
    assert max(int(np.abs(ours[job] - theirs[job]).max()) for job in ours) <= 1
    jobs = load(finished)[1]["job"]  # a cell has 6, of three prompts and two seeds
    apart = [int(np.abs(ours[a] - ours[b]).max()) for i, (a, b) in enumerate(pairwise(jobs)) if i % 6 < 5]
    assert min(apart) > 1  # the control


def test_a_run_goes_on_in_smaller_batches(files: Path, tmp_path: Path) -> None:
    """As after too little memory: what was made stays as it is; every image is there once, as in any other batches."""
    methods = ["base", "mpa", {"method": "mpa", "correct": "resample", "label": "corrected"}]
    wide, narrow = (
        read_config(str(write_config(files, f"by {size}", methods=methods, batch_size=size))) for size in (4, 3)
    )
    run, reference = tmp_path / "run", tmp_path / "reference"
    sweep(narrow, reference)
    sweep(wide, run, limit=2)
    table = load(run)[1]
    lost = table[table["batch"] == table["batch"][0]]
    kept = [*table["file"].drop(lost.index), *(f"records/{name}.json" for name in {*table["batch"]} - {*lost["batch"]})]
    before = {name: (run / name).read_bytes() for name in kept}
    assert len(kept) == 16 + 4
    (run / lost["file"][0]).unlink()  # its batch is made anew
    outcome = sweep(narrow, run)
    assert (outcome.before, outcome.made, outcome.total) == (16, 14, 30)
    assert {name: (run / name).read_bytes() for name in kept} == before
    assert not (run / f"records/{lost['batch'][0]}.json").exists()
    assert load(run)[1]["job"].tolist() == load(reference)[1]["job"].tolist()
    ours, theirs = pixels(run), pixels(reference)
    assert ours.keys() == theirs.keys()
    assert max(int(np.abs(ours[job] - theirs[job]).max()) for job in theirs) <= 1


def test_a_lost_image_costs_no_record_of_the_same_batches(config: Config, finished: Path, tmp_path: Path) -> None:
    """Its batch is made anew under the same name; until then the scores of the others are still there."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / load(run)[1]["file"][20]).unlink()
    sweep(config, run, limit=1)
    assert len(load(run)[1]) == 30
    sweep(config, run)
    assert contents(run) == contents(finished)


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
    as_peft(folder / "jpeg", 4)
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


def test_processes_with_other_files_are_refused(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another copy on another machine: its images would have ids that nobody looks for."""
    monkeypatch.setattr(running, "gather_object", lambda mine: [*mine, mine[0] | {"images": "another"}])
    with pytest.raises(ValueError, match="the processes differ in images; give every machine the same files"):
        sweep(config, tmp_path)
    assert not (tmp_path / "run.json").exists()
