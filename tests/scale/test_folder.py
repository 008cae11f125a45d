"""A folder that `generate` has used before: nothing of the user's is lost, and no old picture passes for a new one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import scale.generate
from scale.folder import RECORD, earlier_pictures, remove_earlier, save_picture, write_record
from scale.generate import generate
from scale.hashes import sha256
from scale.pipeline import Picture
from scale.request import Request
from tests.scale import tiny


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """Two pictures and their record, and files of other kinds."""
    images = [
        save_picture(tmp_path, Picture("red", 0, seed), torch.full((4, 4, 3), seed, dtype=torch.uint8))
        for seed in (7, 8)
    ]
    write_record(tmp_path, {"images": images})
    for name in ("holiday.png", "sheet.png", "notes.txt", "00000.png"):
        (tmp_path / name).write_text("mine")
    return tmp_path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


MINE = {"holiday.png", "sheet.png", "notes.txt", "00000.png"}


def test_an_earlier_run_is_what_its_record_lists(used: Path) -> None:
    """Exactly its pictures are replaced, its record too; files of other names stay."""
    pictures = earlier_pictures(used)
    assert [path.name for path in pictures] == ["00000-7.png", "00000-8.png"]
    assert names(used) == {"00000-7.png", "00000-8.png", RECORD, *MINE}, "looking removes nothing"
    remove_earlier(used, pictures)
    assert names(used) == MINE


def test_an_empty_and_a_missing_folder(tmp_path: Path) -> None:
    """Nothing to replace."""
    assert earlier_pictures(tmp_path) == []
    assert earlier_pictures(tmp_path / "none") == []


def test_a_picture_that_no_record_lists_is_refused(used: Path) -> None:
    """It would pass for one of the new pictures, or be overwritten."""
    (used / "00003-1.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"does not list, or that changed since \(00003-1.png") as refusal:
        earlier_pictures(used)
    assert str(used) in str(refusal.value)


def test_a_picture_that_changed_since_is_refused(used: Path) -> None:
    """Whoever painted over it wants to keep it."""
    (used / "00000-8.png").write_bytes(b"painted over")
    with pytest.raises(ValueError, match=r"00000-8\.png"):
        earlier_pictures(used)


def test_pictures_without_their_record_are_refused(used: Path) -> None:
    """Nobody knows what made them."""
    (used / RECORD).unlink()
    with pytest.raises(ValueError, match="holds 2 pictures"):
        earlier_pictures(used)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "null", '{"images": 3}', '{"images": [3]}', '{"images": [{}]}', "[" * 100_000, "\udcff"],
)
def test_a_record_of_somebody_else_is_refused(used: Path, content: str) -> None:
    """A file of the record's name that is none is not overwritten, and its content does no harm."""
    (used / RECORD).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="is no record of dblend generate"):
        earlier_pictures(used)


def test_a_record_that_lists_foreign_paths_removes_nothing_there(used: Path) -> None:
    """A hostile record names a file outside, with its true hash: only pictures inside the folder are ever found."""
    outside = used.parent / "00000-9.png"
    outside.write_bytes(b"precious")
    listed = [{"file": f"../{outside.name}", "sha256": sha256(outside)}, {"file": str(outside), "sha256": ""}]
    record = json.loads((used / RECORD).read_text())
    write_record(used, {"images": record["images"] + listed})
    remove_earlier(used, earlier_pictures(used))
    assert outside.read_bytes() == b"precious"


def test_a_folder_named_like_a_picture_is_refused(used: Path) -> None:
    """It cannot be replaced by a file."""
    (used / "00001-1.png").mkdir()
    with pytest.raises(ValueError, match=r"00001-1\.png"):
        earlier_pictures(used)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    folder = tmp_path_factory.mktemp("model")
    tiny.sd().save_pretrained(folder)
    return folder


def request_of(model: Path, out: Path, **changes: Any) -> Request:
    prompts = ["a red circle", "a blue square"]
    return replace(Request(prompts, {}, out, method="base", model=str(model), steps=1), **changes)


def test_a_second_run_replaces_the_first(model: Path, tmp_path: Path) -> None:
    """Only what the new record lists is left, and files that are not ours."""
    generate(request_of(model, tmp_path, num=3))
    (tmp_path / "sheet.png").write_text("mine")
    record = generate(request_of(model, tmp_path, num=1, seed=2))
    assert [image["file"] for image in json.loads(record.read_text())["images"]] == ["00000-2.png", "00001-2.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"00000-2.png", "00001-2.png", "generation.json", "sheet.png"}


def test_other_pictures_are_refused_before_the_model_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with pictures that no record lists is named, and stays as it is."""
    monkeypatch.setattr(scale.generate, "open_pipeline", lambda *args, **options: pytest.fail("the model was loaded"))
    (tmp_path / "00000-0.png").write_text("mine")
    with pytest.raises(ValueError, match="move them away, or choose another folder"):
        generate(request_of(model, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["00000-0.png"]


def test_a_run_that_fails_leaves_the_earlier_one(model: Path, tmp_path: Path) -> None:
    """Nothing goes before the first new picture is there."""
    generate(request_of(model, tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="not finite"):
        generate(request_of(model, tmp_path, guidance=1e38))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
