"""An adapter's card: what its YAML says of the step variance, and that no card can do harm."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from scale.adapters import step_variance

HEADS: dict[str, tuple[str, float]] = {
    "number": ("step_variance: 0.95", 0.95),
    "whole": ("step_variance: 2", 2.0),
    "in powers of ten": ("step_variance: 1e-3", 1e-3),  # a word to YAML 1.1
    "among others": ("license: mit\ntags:\n- lora\nstep_variance: 1.5\nbase_model: x/y", 1.5),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter folder; of the weights only the name counts here."""
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    return tmp_path


def card(folder: Path, head: str | bytes) -> Path:
    data = head.encode() if isinstance(head, str) else head
    (folder / "README.md").write_bytes(b"---\n" + data + b"\n---\n# An adapter\n\nstep_variance: 7\n")
    return folder


@pytest.mark.parametrize("case", HEADS)
def test_the_card_of_a_folder_is_read(folder: Path, case: str) -> None:
    """The number in the YAML head, for the folder and for the file in it, as huggingface_hub's own reader finds it."""
    head, expected = HEADS[case]
    assert step_variance(card(folder, head)) == expected
    assert step_variance(folder / "pytorch_lora_weights.safetensors") == expected
    assert float(ModelCard.load(folder / "README.md").data.to_dict()["step_variance"]) == expected


@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["Unix", "Windows"])
def test_line_ends_and_marks_of_editors(folder: Path, ends: str) -> None:
    """A byte order mark, empty lines before the head, and carriage returns are an editor's, not the author's."""
    text = ends.join(["", "---", "step_variance: 0.5", "---", "text"])
    (folder / "README.md").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert step_variance(folder) == 0.5


@pytest.mark.parametrize(
    "text", ["", "# no head\nstep_variance: 3", "---\nlicense: mit\n---\n", "---\n---\n", "---\nopen"]
)
def test_no_card_and_no_key_is_none(folder: Path, text: str) -> None:
    """Without a card, a head, or the key, nothing is known, and that is no error."""
    assert step_variance(folder) is None
    (folder / "README.md").write_text(text)
    assert step_variance(folder) is None


def test_a_card_among_several_adapters_is_nobodys(folder: Path) -> None:
    """A README beside a collection of files speaks for none of them: only the folder's own adapter has it."""
    (folder / "other.safetensors").touch()
    assert step_variance(card(folder, "step_variance: 2")) == 2
    assert step_variance(folder / "other.safetensors") is None
    (folder / "pytorch_lora_weights.safetensors").rename(folder / "another.safetensors")
    assert step_variance(folder / "other.safetensors") is None


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE: dict[str, tuple[str | bytes, str]] = {
    "zero": ("step_variance: 0", "must be a positive number"),
    "negative": ("step_variance: -1", "must be a positive number"),
    "NaN": ("step_variance: .nan", "must be a positive number"),
    "infinite": ("step_variance: .inf", "must be a positive number"),
    "too large": ("step_variance: 1" + "0" * 400, "must be a positive number"),
    "far too large": ("step_variance: 1" + "0" * 5000, "cannot be read"),
    "true": ("step_variance: true", "must be a positive number"),
    "empty": ("step_variance:", "must be a positive number"),
    "words": ("step_variance: large", "as large; it must be a positive number"),
    "a list": ("step_variance: [1]", "must be a positive number"),
    "a table": ("step_variance: {a: 1}", "must be a positive number"),
    "a date": ("step_variance: 2020-01-01", "must be a positive number"),
    "no date": ("step_variance: 2020-99-99", "cannot be read"),
    "no table": ("- step_variance", "no table"),
    "broken": ("step_variance: [1", "cannot be read"),
    "deep": ("step_variance: " + "[" * 50_000, "more than 20 levels"),
    "deep lists": ("- " * 40_000, "more than 20 levels"),
    "deep keys": ("? " * 40_000, "more than 20 levels"),
    "code": ("step_variance: !!python/object/apply:os.system [true]", "cannot be read"),
    "a bomb": (BOMB + "step_variance: 1", "aliases"),
    "a bomb of merged tables": ("a: &a {x: 1}\nb: &b {<<: [*a, *a]}\nstep_variance: 1", "aliases"),
    "two documents": ("step_variance: 1\n--- {step_variance: 2}", "cannot be read"),
    "no UTF-8": (b"step_variance: 1\n# \xff", "not UTF-8"),
    "NUL": (b"step_variance: 1\n\0", "cannot be read"),
    "a long head": ("a: " + "x" * 200_000 + "\nstep_variance: 1", "letters of YAML"),
    "a huge card": ("a: 1\n" * 300_000, "larger than"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_cards_are_refused(folder: Path, case: str) -> None:
    """Numbers that are no variance, YAML that grows or calls, bytes that are no text: a ValueError names the card."""
    head, reason = HOSTILE[case]
    with pytest.raises(ValueError, match=rf"README\.md.*{reason}"):
        step_variance(card(folder, head))


def test_a_missing_adapter_has_no_variance(tmp_path: Path) -> None:
    """A path without an adapter is an error, not a card without the key."""
    with pytest.raises(ValueError, match="no adapter at"):
        step_variance(tmp_path / "none")
