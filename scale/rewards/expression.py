"""Sums of rewards as users write them: `0.2*alignment + 0.8*colorfulness`, `pickscore - 19`."""

import re
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path

from scale.rewards import check_reward, load_scorer, scorer_class
from scale.rewards.protocol import Mix, Scorer

NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
NAME = r"[A-Za-z][A-Za-z0-9]*(?:-[A-Za-z0-9]+)*"
TERM = re.compile(rf"(?P<sign>[+-]?)\s*(?:(?P<number>{NUMBER})(?:\s*\*\s*(?P<scaled>{NAME}))?|(?P<plain>{NAME}))\s*")


def parse_reward(text: str, models: Mapping[str, str | Path] | None = None) -> Scorer:
    """A reward, or a sum of them: terms `name`, `0.3*name` or a constant, joined by `+` and `-`.

    Names hold hyphens, so a minus after a name needs a space before it; other spaces are free. A name that stands
    twice has the sum of its numbers.

    Args:
        text: The expression.
        models: Folder or hub id of the weights, by the name of the reward.

    Raises:
        ValueError: what is no such sum (the message quotes the piece that was not understood), a number that is not
            finite, a name that no reward has, a model that the sum does not use, a reward without its weights.
    """
    models, weights, shift = models or {}, {}, 0.0
    for number, name in terms_of(text):
        if name is None:
            shift += number
        else:
            weights[name] = weights.get(name, 0.0) + number
    if not weights:
        raise ValueError(f"the reward {text!r} names no reward; write e.g. 0.2*alignment + 0.8*colorfulness")
    if unused := sorted(models.keys() - weights.keys()):
        raise ValueError(f"a model is given for {', '.join(unused)}, which the reward {text!r} does not use")
    # a slip in the last name should not cost the loading of the first
    for name in weights:
        check_reward(name, models.get(name))
    terms = [(weight, load_scorer(name, models.get(name))) for name, weight in weights.items()]
    return terms[0][1] if [weight for weight, _ in terms] == [1.0] and not shift else Mix(terms, shift)


def without_gradient(text: str) -> list[str]:
    """The rewards of a sum that no gradient passes through; opens no weights."""
    return [name for _, name in terms_of(text) if name is not None and not scorer_class(name).differentiable]


def terms_of(text: str) -> Iterator[tuple[float, str | None]]:
    """Each term's number with its sign, and its name; None for a constant."""
    whole = rest = text.strip()
    while rest:
        term = TERM.match(rest)
        if term is None or (rest != whole and not term["sign"]):
            raise ValueError(
                f"cannot read {rest!r} in the reward {text!r}; write sums of NAME, NUMBER*NAME and constants, "
                "with spaces around a minus: 0.2*alignment - 3*jpeg + 1"
            )
        number = float(term["number"] or 1)
        if not isfinite(number):
            raise ValueError(f"the number {term['number']} in the reward {text!r} must be finite")
        yield -number if term["sign"] == "-" else number, term["scaled"] or term["plain"]
        rest = rest[term.end() :]
