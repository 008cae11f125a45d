"""Values of a config file: each function reads one, or raises ValueError with what it must be."""

import math
import sys
from collections.abc import Callable, Collection, Mapping
from itertools import combinations
from typing import Any

from scale.request import LAST_SEED

Parser = Callable[[Any], Any]
LARGEST_GRID = 100_000  # preferences


def read(table: Any, parsers: Mapping[str, Parser], where: str) -> dict[str, Any]:
    """The values of a table by their keys; null stands for a key that is not given.

    Raises:
        ValueError: no table, an unknown key (the message lists them), or a value that its parser refuses.
    """
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} must be a table of names and values, received {table!r:.60}")
    if unknown := [key for key in table if key not in parsers]:
        raise ValueError(f"{where} has an unknown {unknown[0]!r:.50}; the keys are {', '.join(parsers)}")
    made = {}
    for key, value in table.items():
        if value is None:
            continue
        try:
            made[key] = parsers[key](value)
        except ValueError as error:
            raise ValueError(f"{where}: {key} {error}") from error
    return made


def text(value: Any) -> str:
    """Words that are not blank."""
    return check(value, isinstance(value, str) and bool(value.strip()), "must be text")


def flag(value: Any) -> bool:
    """True or false."""
    return check(value, isinstance(value, bool), "must be true or false")


def whole(low: int = 1, high: int = LAST_SEED) -> Parser:
    """Of a whole number in [low, high]."""

    def parse(value: Any) -> int:
        fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return check(value, fits, f"must be a whole number of at least {low}")

    return parse


def number(low: float = -math.inf, high: float = math.inf, *, above: float = -math.inf) -> Parser:
    """Of a finite number in [low, high], and greater than `above`."""
    bounds = [f"of at least {low:g}"] if low > -math.inf else []
    bounds += [f"above {above:g}"] if above > -math.inf else []
    bounds += [f"of at most {high:g}"] if high < math.inf else []

    def parse(value: Any) -> float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-4, without a point, as a word
            try:
                value = float(value)
            except ValueError:
                value = repr(value)
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        # a whole number may be too large for a float
        fits = fits and abs(value) <= sys.float_info.max and low <= value <= high and value > above
        return float(check(value, fits, " ".join(["must be a finite number", *bounds])))

    return parse


def one_of(names: Collection[str]) -> Parser:
    """Of one of these words."""
    return lambda value: check(value, isinstance(value, str) and value in names, f"must be one of {', '.join(names)}")


def list_of(parse: Parser) -> Parser:
    """Of a list that is not empty, as a tuple."""

    def parse_list(value: Any) -> tuple[Any, ...]:
        check(value, isinstance(value, list) and bool(value), "must be a list that is not empty")
        return tuple(parse(item) for item in value)

    return parse_list


def table_of(parse: Parser) -> Parser:
    """Of a table of names (no dots, which part the columns of results) and values."""

    def parse_table(value: Any) -> dict[str, Any]:
        check(value, isinstance(value, dict) and bool(value), "must be a table of names and values")
        for name in value:
            check(name, isinstance(name, str) and bool(name) and "." not in name, "must have names without dots")
        return {name: parse(item) for name, item in value.items()}

    return parse_table


def seeds(value: Any) -> int | tuple[int, ...]:
    """A count of seeds that each prompt has of its own, at most 1000; or a list of those that all prompts share."""
    if not isinstance(value, list):
        return whole(1, 1000)(value)
    made = list_of(whole(0))(value)
    check(value, len({*made}) == len(made), "must name each seed once")
    return made


def preferences(axes: Collection[str]) -> Parser:
    """Of weights over `axes`, each a dict that holds every axis: `{grid: h}`, `{w: [...]}` or a list of tables."""
    names = list(axes)

    def parse(value: Any) -> tuple[dict[str, float], ...]:
        if isinstance(value, list):
            return tuple(weights(names)(entry) for entry in value)
        if isinstance(value, dict) and list(value) == ["grid"]:
            return simplex_grid(names, number(above=0.0, high=1.0)(value["grid"]))
        if isinstance(value, dict) and list(value) == ["w"]:
            check(value, len(names) == 2, f"takes w, the first of two rewards' weight, but there are {len(names)}")
            amounts = list_of(number(0.0, 1.0))(value["w"])
            return tuple({names[0]: w, names[1]: 1.0 - w} for w in amounts)
        raise ValueError(
            f"must be {{grid: 0.1}}, {{w: [0.2, 0.5]}} or a list of weights by name, received {value!r:.60}"
        )

    return parse


def weights(axes: Collection[str]) -> Parser:
    """Of a table of weights that sum to 1; the rewards that it leaves out have 0."""

    def parse(value: Any) -> dict[str, float]:
        given = table_of(number(0.0, 1.0))(value)
        if unknown := [name for name in given if name not in axes]:
            raise ValueError(f"names {unknown[0]!r}, which is no reward; the rewards are {', '.join(axes)}")
        check(value, abs(sum(given.values()) - 1) <= 1e-6, "must sum to 1")
        return {name: given.get(name, 0.0) for name in axes}

    return parse


def simplex_grid(names: Collection[str], spacing: float) -> tuple[dict[str, float], ...]:
    """Every preference whose weights are multiples of `spacing`; the first reward's weight grows.

    Raises:
        ValueError: a spacing that does not divide 1, or makes more than 100,000 preferences.
    """
    m, least = len(names), 1 / LARGEST_GRID
    parts = round(1 / max(spacing, least))
    few = spacing >= least and math.comb(parts + m - 1, m - 1) <= LARGEST_GRID
    check(spacing, few, f"must be a grid of at most {LARGEST_GRID} preferences, so of a larger spacing")
    check(spacing, abs(parts * spacing - 1) < 1e-9, "must be a grid whose spacing divides 1")
    made = []
    for bars in combinations(range(parts + m - 1), m - 1):  # stars and bars
        edges = (-1, *bars, parts + m - 1)
        made.append({name: (edges[i + 1] - edges[i] - 1) / parts for i, name in enumerate(names)})
    return tuple(made)


def check(value: Any, fits: bool, what: str) -> Any:
    """The value, or ValueError with what it must be."""
    if not fits:
        raise ValueError(f"{what}, received {value!r:.60}")
    return value
