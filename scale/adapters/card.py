"""What an adapter's card says of it: the YAML at the head of the README beside the weights."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from dbtheory.preference import BASE
from scale.adapters.find import adapter_file
from scale.adapters.read import first_line, short_text

CARD = "README.md"
KEY = "step_variance"
LARGEST_CARD = 1_000_000  # bytes
LARGEST_HEAD = 100_000  # letters: a second of PyYAML
DEEPEST = 20  # levels of tables and lists
HEAD = re.compile(r"\A\ufeff?\s*^---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def step_variance(path: str | Path) -> float | None:
    """The variance of an adapter's own denoising steps, in units of the sampler's, for MSDDA; None if no card says it.

    `path` is an adapter folder, or the file in it; a file among other adapters has no card of its own.

    Raises:
        ValueError: no adapter at `path`; a card that cannot be read, or whose `step_variance` is no positive finite
            number.
    """
    file = adapter_file(Path(path))
    card = file.with_name(CARD)
    if not card.is_file() or not _owns(file):
        return None
    head = HEAD.match(short_text(card, LARGEST_CARD))
    table = _table(head[1], card) if head else {}
    return _variance(table[KEY], card) if KEY in table else None


def stated_variances(adapters: Mapping[str, str | Path]) -> dict[str, float] | None:
    """The `step_variance` of each adapter by its name, 1 where its card is silent, and of the base; None if all are.

    Raises:
        ValueError: as `step_variance`.
    """
    stated = {name: step_variance(path) for name, path in adapters.items()}
    return {BASE: 1.0} | {name: variance or 1.0 for name, variance in stated.items()} if any(stated.values()) else None


def _owns(file: Path) -> bool:
    """Whether the card beside a file is the file's: whether it is the adapter of its folder."""
    try:
        return adapter_file(file.parent) == file
    except ValueError:
        return False


def _table(head: str, card: Path) -> dict[str, object]:
    if len(head) > LARGEST_HEAD:
        raise ValueError(f"{card} has more than {LARGEST_HEAD} letters of YAML, so it is not read; shorten it")
    try:
        danger = yaml_danger(head)
        table = None if danger else yaml.safe_load(head)
    except Exception as error:  # a hostile card can make the parser raise anything
        raise ValueError(f"{card} has YAML that cannot be read: {first_line(error)}") from error
    if danger:
        raise ValueError(f"{card} has {danger} in its YAML, which are not read; write a plain table")
    if table is not None and not isinstance(table, dict):
        raise ValueError(f"{card} has YAML that is no table of names and values")
    return table or {}


def yaml_danger(head: str) -> str | None:
    """What would make PyYAML need a gigabyte or minutes, found while it has not yet."""
    depth = 0
    for event in yaml.parse(head, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):  # a few aliases of aliases are endless once they are written out
            return "aliases"
        if depth > DEEPEST:  # its scanner takes the square of the depth
            return f"more than {DEEPEST} levels"
    return None


def _variance(value: object, card: Path) -> float:
    # YAML 1.1 reads 1e-3, without a point, as a word
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            variance = float(value)
        except (ValueError, OverflowError):
            variance = math.nan
        if 0 < variance < math.inf:
            return variance
    raise ValueError(f"{card} gives {KEY} as {value!s:.50}; it must be a positive number")
