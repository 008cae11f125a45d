"""Rewards of images, one scorer a file; `load_scorer` finds them by name."""

from collections.abc import Callable
from importlib import import_module

from scale.rewards.protocol import Scorer

SCORERS = {
    "alignment": "scale.rewards.alignment:Alignment",
    "colorfulness": "scale.rewards.colorfulness:Colorfulness",
    "jpeg": "scale.rewards.jpeg:Jpeg",
}


def load_scorer(name: str) -> Scorer:
    """The scorer of that name; ValueError for a name that is not in `SCORERS`."""
    if name not in SCORERS:
        raise ValueError(f"no reward {name!r}; the rewards are {', '.join(sorted(SCORERS))}")
    module, attribute = SCORERS[name].split(":")
    make: Callable[[], Scorer] = getattr(import_module(module), attribute)
    return make()
