"""The methods of a config: what each entry may say, and what it means."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scale.experiment import values
from scale.methods import METHODS, Edge
from scale.prompts import parse_midpoints

STEERED = ("code", "rgg")  # what asks rewards while it makes an image
NAMES = (*METHODS, "morl", *STEERED)
_variances = values.table_of(values.number(above=0.0))
_CORRECT = {"correct": values.one_of(["resample"])}
OPTIONS: Mapping[str, Mapping[str, values.Parser]] = {
    "mpa": _CORRECT,
    "kla": _CORRECT,
    "mpa-ls": {"order": values.one_of(["low-discrepancy", "iid"])},
    "mpa-held": {"exact": values.number(0.0, 1.0)},
    "msdda": {"variances": _variances},
    "interp": _CORRECT,
    "code": {"candidates": values.whole(), "block": values.whole()},
    "rgg": {
        "alpha": values.number(above=0.0),
        "gamma": values.number(0.0),
        "normalise": values.flag,
        "schedule": values.one_of(["printed", "das"]),
    },
}
# whatever an image depends on, so that records say it
DEFAULTS = {
    "mpa-ls": {"order": "low-discrepancy"},
    "mpa-held": {"exact": 0.2},
    "code": {"candidates": 20, "block": 5},
    "rgg": {"gamma": 0.024, "normalise": True, "schedule": "printed"},
}


@dataclass(frozen=True)
class Expert:
    """An adapter that was trained for one preference and lambda."""

    weights: Mapping[str, float]
    kl_scale: float
    adapter: Path


@dataclass(frozen=True)
class Entry:
    """One method of a config, with what it has of its own; None is the config's."""

    method: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `OPTIONS`; defaults that the images depend on are filled in."""
    midpoints: Mapping[Edge, Path] = field(default_factory=dict)
    experts: tuple[Expert, ...] = ()
    preferences: tuple[Mapping[str, float], ...] | None = None
    lambdas: tuple[float, ...] | None = None
    seeds: int | tuple[int, ...] | None = None
    prompt_limit: int | None = None
    batch_size: int | None = None
    max_rows: int | None = None


def read_entries(given: Any, axes: Collection[str], place: Callable[[str], Path]) -> tuple[Entry, ...]:
    """The entries of a config's `methods`; `place` finds the adapter that a text names.

    Raises:
        ValueError: no list, an unknown method, a key that the method does not have, a value that it cannot have, an
            adapter that is not there, a label twice.
    """
    entries = tuple(_entry(item, axes, place) for item in values.list_of(lambda item: item)(given))
    labels = [entry.label for entry in entries]
    if twice := [label for i, label in enumerate(labels) if label in labels[:i]]:
        raise ValueError(f"has {twice[0]!r} twice; give one of them a label of its own")
    return entries


def _entry(item: Any, axes: Collection[str], place: Callable[[str], Path]) -> Entry:
    table = {"method": item} if isinstance(item, str) else item
    method = table.get("method") if isinstance(table, dict) else None
    if method not in NAMES:
        raise ValueError(f"has no method {method!r:.50} in {item!r:.60}; the methods are {', '.join(NAMES)}")
    made = values.read(table, _parsers(method, axes, place), f"of {method}")
    options = DEFAULTS.get(method, {}) | {name: made.pop(name) for name in OPTIONS.get(method, {}) if name in made}
    if method == "rgg" and "alpha" not in options:
        raise ValueError("of rgg: alpha is missing, the scale of the reward that guides")
    for name, needed in (("midpoints", "interp"), ("experts", "morl")):
        if method == needed and name not in made:
            raise ValueError(f"of {method}: {name} are missing")
    made.setdefault("label", _label(method, options))
    return Entry(**made, options=options)


def _parsers(method: str, axes: Collection[str], place: Callable[[str], Path]) -> dict[str, values.Parser]:
    """What an entry of this method may say."""
    parsers = {"method": values.text, "label": values.text, **OPTIONS.get(method, {})}
    parsers |= {"seeds": values.seeds, "prompt_limit": values.whole(), "batch_size": values.whole()}
    if method != "base":
        parsers |= {"preferences": values.preferences(axes), "lambdas": values.list_of(values.number(0.0))}
    if method in STEERED:
        parsers["max_rows"] = values.whole()
    if method == "interp":
        parsers["midpoints"] = lambda given: _midpoints(given, place)
    if method == "morl":
        parsers["experts"] = values.list_of(lambda given: _expert(given, axes, place))
    return parsers


def _midpoints(given: Any, place: Callable[[str], Path]) -> dict[Edge, Path]:
    words = [f"{edge}={path}" for edge, path in values.table_of(values.text)(given).items()]
    return {edge: place(str(path)) for edge, path in parse_midpoints(words).items()}


def _expert(given: Any, axes: Collection[str], place: Callable[[str], Path]) -> Expert:
    parsers = {"weights": values.weights(axes), "lambda": values.number(above=0.0), "adapter": values.text}
    made = values.read(given, parsers, "an expert")
    if missing := [key for key in ("weights", "adapter") if key not in made]:
        raise ValueError(f"must say the {missing[0]} of each")
    return Expert(made["weights"], made.get("lambda", 1.0), place(made["adapter"]))


def _label(method: str, options: Mapping[str, Any]) -> str:
    """The method's name, and the options that are not its defaults."""
    usual = DEFAULTS.get(method, {})
    own = [f"{name}={value}" for name, value in options.items() if value != usual.get(name)]
    return " ".join([method, *(word for word in own if len(word) < 30)])
