"""Cells, ids and batches are functions of the config and of the files alone."""

from pathlib import Path
from typing import Any

import pytest

from scale.experiment.config import read_config
from scale.experiment.jobs import Batch, keep, make_batches, plan
from tests.scale.experiment.fixtures import write_config

REWARDS = {"colorfulness": "colorfulness", "jpeg": "jpeg"}


def batches(files: Path, model: str = "m", **changes: Any) -> list[Batch]:
    config = read_config(str(write_config(files, "jobs", **changes)))
    return make_batches(config, plan(config)[0], {"denoiser": model}, REWARDS)


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


def test_batches_hold_every_image_in_order(files: Path) -> None:
    """No batch mixes cells, and the last of a cell may be smaller; resampled images of a prompt stay together."""
    made = batches(files, batch_size=4)
    assert [len(batch.pictures) for batch in made] == [4, 2] * 5
    assert [batch.index for batch in made] == list(range(10))
    together = batches(files, batch_size=5, methods=[{"method": "mpa", "correct": "resample"}])
    assert [{picture.index for picture in batch.pictures} for batch in together] == [{0, 1}, {2}] * 2
    with pytest.raises(ValueError, match="depend on each other"):
        batches(files, batch_size=1, methods=[{"method": "mpa", "correct": "resample"}])


def test_a_limit_keeps_the_first_whole_batches_of_each_cell(files: Path) -> None:
    """3 images are two batches of two, in every cell; batches are the same as without a limit."""
    every = batches(files)
    kept = keep(every, 3)
    assert [batch.index for batch in kept] == [3 * cell + i for cell in range(5) for i in range(2)]
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
