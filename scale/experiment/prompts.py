"""The prompts of an experiment: of the small world, of a list, or of a file, with the tags that it gives them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale.mini import world
from scale.prompts import read_prompts

SHIPPED = {"held-out": world.held_out_prompts, "train": world.train_prompts}


@dataclass(frozen=True)
class Prompt:
    """What to draw, and what kind of prompt it is: GenEval's tag, or nothing."""

    text: str
    tag: str = ""


def find_prompts(given: Any) -> tuple[Prompt, ...]:
    """`held-out`, `train`, a list of texts, or a file (`.jsonl`: GenEval's; else what `read_prompts` reads).

    A prompt that stands twice is taken once: its images would be the same.

    Raises:
        ValueError: none of these, a file that cannot be read, a line of a `.jsonl` without a `prompt`.
    """
    if isinstance(given, list):
        if odd := [item for item in given if not isinstance(item, str) or not item.strip()]:
            raise ValueError(f"hold {odd[0]!r:.50}, which YAML reads as no text; put it in quotes")
        found = [Prompt(text) for text in given]
    elif isinstance(given, str) and given in SHIPPED:
        found = [Prompt(text) for text in SHIPPED[given]()]
    elif isinstance(given, str):
        path = Path(given)
        found = _tagged(path) if path.suffix.lower() == ".jsonl" else [Prompt(text) for text in read_prompts(path)]
    else:
        raise ValueError(f"must be {', '.join(SHIPPED)}, a file or a list, received {given!r:.50}")
    if not found:
        raise ValueError("hold no prompt")
    first: dict[str, Prompt] = {}
    for prompt in found:
        first.setdefault(prompt.text, prompt)
    return tuple(first.values())


def _tagged(path: Path) -> list[Prompt]:
    """The prompts and tags of a file with one JSON object a line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read from {path}: {error}") from error
    made = []
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            text, tag = item["prompt"], item.get("tag", "")
            if not isinstance(text, str) or not text.strip() or not isinstance(tag, str):
                raise ValueError("no texts")
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f'of {path} need texts as "prompt" and "tag": line {place} is {line!r:.60}') from error
        made.append(Prompt(text, tag))
    return made
