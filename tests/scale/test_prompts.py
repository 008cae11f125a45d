"""What users type: prompt files, weights, adapters."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale.prompts import parse_adapters, parse_midpoints, parse_variances, parse_weights, read_prompts
from scale.schedules import PiecewiseLinear


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
    """NAME=WEIGHT words in their order, as numbers or as functions of progress."""
    assert parse_weights(["b=0.7", "a=.2", "c=1e-1"]) == {"b": 0.7, "a": 0.2, "c": 0.1}
    assert list(parse_weights(["b=0.7", "a=0.3"])) == ["b", "a"]
    assert parse_weights(["a=-0.5"]) == {"a": -0.5}, "signs are the preference's business"
    assert parse_weights([]) == {}
    assert parse_weights(["a=0.2->0.8", "b=.8->.2->.5"]) == {
        "a": PiecewiseLinear((0.2, 0.8)), "b": PiecewiseLinear((0.8, 0.2, 0.5)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["jpeg"], "'jpeg' is not NAME=VALUE"),
        (["jpeg="], "'jpeg=' is not NAME=VALUE"),
        (["=0.5"], "'=0.5' is not NAME=VALUE"),
        (["0.5"], "'0.5' is not NAME=VALUE"),
        (["jpeg=0.5", "jpeg=0.5"], "'jpeg' is given twice"),
        (["jpeg=half"], "'jpeg' must be a number, .* received 'half'"),
        (["jpeg=0,5"], "'jpeg' must be a number"),
        (["jpeg=nan"], "'jpeg' must be finite"),
        (["jpeg=inf"], "'jpeg' must be finite"),
        (["jpeg=-inf"], "'jpeg' must be finite"),
        (["jpeg=1e999"], "'jpeg' must be finite"),
        (["jpeg=0.2->"], "'jpeg' must be a number, or several"),
        (["jpeg=0.2-"], "in quotes"),  # what is left where the shell took the rest as a file to write
        (["jpeg=0->1e400"], "'jpeg' must be finite"),
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


def test_variances() -> None:
    """NAME=V words, of "base" too."""
    assert parse_variances(["base=1", "a=.5"]) == {"base": 1.0, "a": 0.5}


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e400", "1->2", "x", "0.5-"])
def test_wrong_variances_are_refused(value: str) -> None:
    """A variance is one positive finite number, the same at every step."""
    with pytest.raises(ValueError, match="the variance of 'a' must be"):
        parse_variances([f"a={value}"])


def test_midpoints() -> None:
    """A+B=PATH words, an edge each; a path may hold = and + itself."""
    assert parse_midpoints(["a+b=x/y=1+2", "base+a=half"]) == {("a", "b"): Path("x/y=1+2"), ("base", "a"): Path("half")}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["a+b"], "'a\\+b' is not NAME=VALUE"),
        (["a=x"], "'a' must join two different names"),
        (["a+b+c=x"], "must join two different names"),
        (["a+a=x"], "must join two different names"),
        (["+a=x"], "must join two different names"),
        (["a+=x"], "must join two different names"),
        (["a+b=x", "a+b=y"], "given twice"),
        (["a+b=x", "b+a=y"], "given twice"),
    ],
)
def test_wrong_midpoints_are_refused(words: list[str], reason: str) -> None:
    """An edge has two ends, and one middle."""
    with pytest.raises(ValueError, match=reason):
        parse_midpoints(words)


@pytest.mark.parametrize("parse", [parse_weights, parse_adapters, parse_variances, parse_midpoints])
@given(words=st.lists(st.text(alphabet="ab=+->.019enif\x00é", max_size=12), max_size=4))
def test_any_words_parse_or_are_a_value_error(parse, words: list[str]) -> None:
    """Nothing else ever comes out of what a user types."""
    with contextlib.suppress(ValueError):
        assert isinstance(parse(words), dict)
