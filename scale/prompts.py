"""Prompts, weights, adapters and their like as users write them."""

import json
from collections.abc import Sequence
from pathlib import Path

from scale.schedules import Amount, parse_amount


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


def parse_weights(words: Sequence[str]) -> dict[str, Amount]:
    """`["style=0.7", "shape=0.2->0.4"]` as numbers and functions of progress (0 at noise, 1 at data).

    Raises:
        ValueError: a word without `=`, a name twice, or what is neither a number nor numbers joined by `->`.
    """
    return {
        name: parse_amount(f"the weight of {name!r}", value)
        for name, value in parse_pairs(words, "weight", "colorfulness=0.7").items()
    }


def parse_adapters(words: Sequence[str]) -> dict[str, Path]:
    """`["style=lora.safetensors"]` as a dict of paths; ValueError for a word without `=` or a name twice."""
    return {name: Path(value) for name, value in parse_pairs(words, "adapter", "style=lora.safetensors").items()}


def parse_variances(words: Sequence[str]) -> dict[str, float]:
    """`["base=1", "style=0.8"]`, in units of the sampler's own step variance, as positive numbers.

    Raises:
        ValueError: a word without `=`, a name twice, or no positive finite number.
    """
    variances = {}
    for name, value in parse_pairs(words, "variance", "style=0.8").items():
        try:
            amount = parse_amount("variance", value)
        except ValueError:
            amount = None
        if not isinstance(amount, float) or amount <= 0:
            raise ValueError(f"the variance of {name!r} must be one positive finite number, received {value!r}")
        variances[name] = amount
    return variances


def parse_midpoints(words: Sequence[str]) -> dict[tuple[str, str], Path]:
    """`["style+shape=both.safetensors", "base+style=half"]`: an edge's two ends, and the adapter of its middle.

    Raises:
        ValueError: a word without `=`, an edge twice, or one that is not two different names joined by `+`.
    """
    midpoints: dict[tuple[str, str], Path] = {}
    for edge, value in parse_pairs(words, "midpoint", "style+shape=both.safetensors").items():
        ends = edge.split("+")
        if len(ends) != 2 or not all(ends) or ends[0] == ends[1]:
            raise ValueError(f"midpoint {edge!r} must join two different names by +; write e.g. base+style=half")
        if {*ends} in [{*known} for known in midpoints]:
            raise ValueError(f"the midpoint of {edge!r} is given twice; give each edge once")
        midpoints[ends[0], ends[1]] = Path(value)
    return midpoints


def parse_pairs(words: Sequence[str], kind: str, example: str) -> dict[str, str]:
    """`["a=b", "c=d"]` as a dict; ValueError, which says `kind`, for a word without `=` or a name twice."""
    pairs: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{kind} {word!r} is not NAME=VALUE; write e.g. {example}")
        if name in pairs:
            raise ValueError(f"{kind} {name!r} is given twice; give each name once")
        pairs[name] = value
    return pairs
