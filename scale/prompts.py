"""Prompts, weights and adapters as users write them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path


def read_prompts(path: Path) -> list[str]:
    """Prompts of a JSON list of strings (`.json`, the reference's format) or of a text file, one a line.

    Raises:
        ValueError: no such file, text that is not UTF-8, JSON that is no list of strings, or no prompt in it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows put a mark before the text
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompt file {path}: {error}") from error
    if path.suffix.lower() != ".json":
        prompts = [line.strip() for line in text.splitlines()]
    else:
        try:
            prompts = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the prompt file {path} is no JSON: {error}") from error
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f'the prompt file {path} must be a JSON list of strings, e.g. ["a red car"]')
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(f"the prompt file {path} holds no prompt; write one a line, or a JSON list of strings")
    return prompts


def parse_weights(words: Sequence[str]) -> dict[str, float]:
    """`["colorfulness=0.7", "jpeg=0.3"]` as a dict; ValueError for a word without `=`, a name twice, or no number."""
    weights = {}
    for name, value in _pairs(words, "weight", "colorfulness=0.7"):
        try:
            weights[name] = float(value)
        except ValueError:
            raise ValueError(f"the weight of {name!r} must be a number, received {value!r}") from None
        if not math.isfinite(weights[name]):
            raise ValueError(f"the weight of {name!r} must be finite, received {value!r}")
    return weights


def parse_adapters(words: Sequence[str]) -> dict[str, Path]:
    """`["style=lora.safetensors"]` as a dict of paths; ValueError for a word without `=` or a name twice."""
    return {name: Path(value) for name, value in _pairs(words, "adapter", "style=lora.safetensors")}


def _pairs(words: Sequence[str], kind: str, example: str) -> list[tuple[str, str]]:
    pairs = []
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{kind} {word!r} is not NAME=VALUE; write e.g. {example}")
        if name in dict(pairs):
            raise ValueError(f"{kind} {name!r} is given twice; give each name once")
        pairs.append((name, value))
    return pairs
