"""Cells, ids and batches are functions of the config and of the files alone."""

import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from scale.attachment import attach
from scale.baselines import code, rgg
from scale.experiment.cells import plan
from scale.experiment.config import read_config
from scale.experiment.jobs import Batch, digest, keep, left, make_batches
from scale.experiment.make import Maker
from scale.pipeline import SCHEDULERS
from tests.scale.experiment.fixtures import as_peft, write_config

REWARDS = {name: {"reward": name, "files": {}} for name in ("colorfulness", "jpeg")}


def batches(files: Path, model: str = "m", rewards: Mapping[str, Any] = REWARDS, **changes: Any) -> list[Batch]:
    config = read_config(str(write_config(files, "jobs", **changes)))
    return make_batches(config, plan(config)[0], {"denoiser": model}, rewards)


def ids(made: list[Batch]) -> list[str]:
    return [job for batch in made for job in batch.ids]


def test_prompts_share_no_noise_unless_they_are_told_to(files: Path) -> None:
    """A count gives each prompt seeds of its own, whatever else is made; a list gives all of them the same."""

    def seeds(**changes: Any) -> list[list[int]]:
        first = {batch.cell.label: batch.cell for batch in batches(files, **changes)}["base"]
        return [[p.seed for p in first.pictures if p.index == i] for i in range(len(first.prompts))]

    assert seeds(seeds=2) == [[0, 1], [1000, 1001], [2000, 2001]]
    assert seeds(seeds=1, prompt_limit=2) == [[0], [1000]]
    assert seeds(seeds=[7, 3]) == [[7, 3]] * 3


def test_ids_are_of_what_makes_the_image(files: Path) -> None:
    """Equal for equal configs and any batch size; all others with another seed, step, model, adapter or weight."""
    first = batches(files)
    assert ids(first) == ids(batches(files)) == ids(batches(files, batch_size=5))
    assert len({*ids(first)}) == len(ids(first)) == 30
    assert [batch.id for batch in first] != [batch.id for batch in batches(files, batch_size=5)]
    assert ids(batches(files, prompt_limit=1)) == [job for i, job in enumerate(ids(first)) if i % 6 < 2]
    other_adapter = {"colorfulness": str(files / "both"), "jpeg": str(files / "jpeg")}
    for other in ({"seeds": [7, 8]}, {"steps": 3}, {"eta": 0.5}, {"model": "n"}, {"scheduler": "ddpm"}):
        assert not {*ids(first)} & {*ids(batches(files, **other))}, other
    # base has neither weights nor adapters
    for other in ({"adapters": other_adapter}, {"preferences": {"w": [0.3, 0.4]}}, {"lambdas": [0.5]}):
        assert {*ids(first)} & {*ids(batches(files, **other))} == {*ids(first)[:6]}, other


def test_ids_are_of_all_that_acts_on_an_image(files: Path, tmp_path: Path) -> None:
    """PEFT's alpha, a card's step variance and the weights of a reward that steers; each where it acts, and only there.

    How much is made at once, or said of the same thing in other words, is in no id.
    """
    folders = {name: as_peft(shutil.copytree(files / name, tmp_path / name), 4) for name in ("colorfulness", "jpeg")}
    usual = {"adapters": {name: str(folder) for name, folder in folders.items()}}
    methods = ["base", "mpa", "msdda", {"method": "code", "candidates": 2}]

    def of(method: str, **changes: Any) -> set[str]:
        made = batches(files, **usual | {"methods": methods} | changes)
        return {job for batch in made if batch.cell.method == method for job in batch.ids}

    def changed(**changes: Any) -> list[str]:
        return [method for method in before if of(method, **changes) != before[method]]

    before = {method: of(method) for method in ("base", "mpa", "msdda", "code")}
    assert changed() == changed(batch_size=3, methods=[*methods[:3], {**methods[3], "max_rows": 2, "block": 5}]) == []
    other = {name: value | {"files": {"model.safetensors": "0" * 64}} for name, value in REWARDS.items()}
    assert changed(rewards=other) == ["code"]
    (folders["jpeg"] / "README.md").write_text("---\nstep_variance: 2.0\n---\n")
    assert changed() == ["msdda"]
    (folders["jpeg"] / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 3}')
    assert changed() == ["mpa", "msdda"]


def test_a_record_says_the_defaults(files: Path) -> None:
    """What an entry leaves out is in its images' origin, and is what `attach`, `code` and `rgg` would take."""
    methods = ["mpa-ls", "mpa-held", "code", {"method": "rgg", "alpha": 0.1}]
    made = batches(files, methods=methods, preferences=[{"colorfulness": 1}])
    options = {batch.cell.method: batch.origin["options"] for batch in made}
    assert {method: sorted(own) for method, own in options.items()} == {
        "mpa-ls": ["order"], "mpa-held": ["exact"], "code": ["block", "candidates"],
        "rgg": ["alpha", "gamma", "normalise", "schedule"],
    }  # fmt: skip
    for method, function in {"mpa-ls": attach, "mpa-held": attach, "code": code, "rgg": rgg}.items():
        usual = inspect.signature(function).parameters
        assert all(value == usual[name].default for name, value in options[method].items() if name != "alpha")


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS.keys() - {"flow-euler"}))
def test_the_model_is_plain_data(files: Path, scheduler: str) -> None:
    """With the settings of every scheduler, of which some are infinite: an id can be made of it."""
    model = Maker(read_config(str(write_config(files, scheduler, scheduler=scheduler))), ()).model
    assert model["settings"]["scheduler"]["beta_end"] > 0
    assert digest(model) == digest(json.loads(json.dumps(model)))


def test_what_is_left_of_other_batches(files: Path) -> None:
    """Whole batches where they are of one size; else every image that is not done, once, and no other."""
    every, wide = batches(files), batches(files, batch_size=4)
    done = {*every[0].ids, *every[4].ids}
    assert left(every, done) == [*every[1:4], *every[5:]]
    assert left(every, set()) == every
    rest = left(wide, done)
    by_id = {job: picture for batch in every for job, picture in zip(batch.ids, batch.pictures, strict=True)}
    assert ids(rest) == [job for job in ids(wide) if job not in done]
    assert [len(batch.pictures) for batch in rest] == [2, 2, 2, 2] + [4, 2] * 3
    assert [batch.index for batch in rest[:4]] == [2, 4, 6, 10]
    assert all(batch.pictures == [by_id[job] for job in batch.ids] for batch in rest)
    assert left(every, ids(every)) == []


def test_batches_hold_every_image_in_order(files: Path) -> None:
    """No batch mixes cells, and the last of a cell may be smaller; resampled images of a prompt stay together."""
    made = batches(files, batch_size=4)
    assert [len(batch.pictures) for batch in made] == [4, 2] * 5
    assert [batch.index for batch in made] == [6 * cell + first for cell in range(5) for first in (0, 4)]
    together = batches(files, batch_size=5, methods=[{"method": "mpa", "correct": "resample"}])
    assert [{picture.index for picture in batch.pictures} for batch in together] == [{0, 1}, {2}] * 2
    with pytest.raises(ValueError, match="depend on each other"):
        batches(files, batch_size=1, methods=[{"method": "mpa", "correct": "resample"}])


def test_a_limit_keeps_the_first_whole_batches_of_each_cell(files: Path) -> None:
    """3 images are two batches of two, in every cell; batches are the same as without a limit."""
    every = batches(files)
    kept = keep(every, 3)
    assert [batch.index for batch in kept] == [6 * cell + first for cell in range(5) for first in (0, 2)]
    assert keep(every, None) == every


def test_cells_of_every_method(files: Path) -> None:
    """Preferences cross lambdas; what a method does not have is skipped, with a reason."""
    experts = [{"weights": {"colorfulness": 0.5, "jpeg": 0.5}, "adapter": str(files / "both")}]
    methods = [
        "base", "mpa", "mpa-ls", "mpa-held", "kla", "rs", "msdda", {"method": "morl", "experts": experts}, "code",
        {"method": "interp", "midpoints": {"colorfulness+jpeg": str(files / "both")}, "lambdas": [1]},
        {"method": "rgg", "alpha": 0.1, "preferences": [{"jpeg": 1}, {"colorfulness": 1}]},
    ]  # fmt: skip
    path = write_config(files, "all", methods=methods, preferences={"grid": 0.5}, lambdas=[1, 2])
    cells, skipped = plan(read_config(str(path)))
    counts = {label: [0, 0] for label in (cell.label for cell in (*cells, *skipped))}
    for i, several in enumerate((cells, skipped)):
        for cell in several:
            counts[cell.label][i] += 1
    assert counts == {
        "base": [1, 0], "mpa": [6, 0], "mpa-ls": [3, 3], "mpa-held": [3, 3], "kla": [4, 2], "rs": [6, 0],
        "msdda": [6, 0], "morl": [3, 3], "code": [3, 3], "interp": [3, 0], "rgg alpha=0.1": [1, 3],
    }  # fmt: skip
    assert all(skip.reason for skip in skipped)
    flat = [skip for skip in skipped if skip.label == "rgg alpha=0.1" and skip.kl_scale == 1]
    assert [skip.reason for skip in flat] == ["rgg needs the gradient of its rewards, and jpeg has none"]
    morl = [cell for cell in cells if cell.label == "morl"]
    assert [[path.name for path in cell.adapters.values()] for cell in morl] == [["jpeg"], ["both"], ["colorfulness"]]


def test_the_same_images_twice_are_refused(files: Path) -> None:
    """Two labels for one thing would write one file, also where they share only some of their seeds."""
    for seeds in ([0, 1], [1, 2]):
        with pytest.raises(ValueError, match="make the same images"):
            batches(files, methods=["mpa", {"method": "mpa", "label": "again", "seeds": seeds}])
    assert batches(files, methods=["mpa", {"method": "mpa", "label": "again", "seeds": [2, 3]}])
