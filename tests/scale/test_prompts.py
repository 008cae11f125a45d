"""What users type: prompt files, weights, adapters."""

import json
from pathlib import Path

import pytest

from scale.prompts import parse_adapters, parse_weights, read_prompts


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.json", json.dumps(["a red car", "", "ein grüner Ring"])),
        ("p.JSON", json.dumps(["a red car", "  ", "ein grüner Ring"])),
        ("p.txt", "a red car\n\n  ein grüner Ring  \n"),
        ("p.txt", "a red car\r\nein grüner Ring"),
        ("p", "a red car\nein grüner Ring\n"),
        ("p.json", "\ufeff" + json.dumps(["a red car", "ein grüner Ring"])),
        ("p.txt", "\ufeffa red car\nein grüner Ring"),
    ],
)
def test_prompt_files(tmp_path: Path, name: str, content: str) -> None:
    """JSON lists and text files give the same prompts, without blank ones or the mark of Windows editors."""
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / name) == ["a red car", "ein grüner Ring"]


WRONG_FILES = {
    "no JSON": ("p.json", b"a red car", "no JSON"),
    "half a list": ("p.json", b'["a red car", ', "no JSON"),
    "deep JSON": ("p.json", b"[" * 100_000, "no JSON"),
    "an object": ("p.json", b'{"prompt": "a red car"}', "list of strings"),
    "a string": ("p.json", b'"a red car"', "list of strings"),
    "numbers": ("p.json", b'["a red car", 3]', "list of strings"),
    "null": ("p.json", b"null", "list of strings"),
    "an empty list": ("p.json", b"[]", "no prompt"),
    "blank strings": ("p.json", b'["", " "]', "no prompt"),
    "empty JSON": ("p.json", b"", "no JSON"),
    "empty text": ("p.txt", b"", "no prompt"),
    "blank text": ("p.txt", b"\n \n", "no prompt"),
    "Latin-1": ("p.txt", "grün".encode("latin-1"), "cannot read"),
    "Latin-1 in JSON": ("p.json", '["grün"]'.encode("latin-1"), "cannot read"),
    "a picture": ("p.txt", b"\x89PNG\r\n\x1a\n\xff", "cannot read"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_prompt_files_are_refused(tmp_path: Path, case: str) -> None:
    """A prompt file that is no list of prompts is a ValueError that names the file and what is wrong."""
    name, content, reason = WRONG_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason) as refusal:
        read_prompts(tmp_path / name)
    assert name in str(refusal.value)


@pytest.mark.parametrize("name", ["none.json", "none.txt", "."])
def test_a_missing_prompt_file_and_a_folder(tmp_path: Path, name: str) -> None:
    """No file, and a folder instead of one, are refused by name."""
    with pytest.raises(ValueError, match="cannot read the prompt file"):
        read_prompts(tmp_path / name)


def test_weights() -> None:
    """NAME=WEIGHT words in their order, in any way that Python reads a number."""
    assert parse_weights(["b=0.7", "a=.2", "c=1e-1"]) == {"b": 0.7, "a": 0.2, "c": 0.1}
    assert list(parse_weights(["b=0.7", "a=0.3"])) == ["b", "a"]
    assert parse_weights(["a=-0.5"]) == {"a": -0.5}, "signs are the preference's business"
    assert parse_weights([]) == {}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["jpeg"], "'jpeg' is not NAME=VALUE"),
        (["jpeg="], "'jpeg=' is not NAME=VALUE"),
        (["=0.5"], "'=0.5' is not NAME=VALUE"),
        (["0.5"], "'0.5' is not NAME=VALUE"),
        (["jpeg=0.5", "jpeg=0.5"], "'jpeg' is given twice"),
        (["jpeg=half"], "'jpeg' must be a number, received 'half'"),
        (["jpeg=0,5"], "'jpeg' must be a number"),
        (["jpeg=nan"], "'jpeg' must be finite"),
        (["jpeg=inf"], "'jpeg' must be finite"),
        (["jpeg=-inf"], "'jpeg' must be finite"),
        (["jpeg=1e999"], "'jpeg' must be finite"),
    ],
)
def test_wrong_weights_are_refused(words: list[str], reason: str) -> None:
    """Words that are no weights are a ValueError that names the word."""
    with pytest.raises(ValueError, match=reason):
        parse_weights(words)


def test_adapters() -> None:
    """NAME=PATH words; a path may hold `=` itself."""
    assert parse_adapters(["a=x.safetensors", "b=/y/r=4"]) == {"a": Path("x.safetensors"), "b": Path("/y/r=4")}
    with pytest.raises(ValueError, match="'a' is given twice"):
        parse_adapters(["a=x", "a=y"])
    with pytest.raises(ValueError, match="adapter 'x' is not NAME=VALUE"):
        parse_adapters(["x"])
