"""Rewards of images, one scorer a file; `load_scorer` finds them by name."""

from importlib import import_module
from pathlib import Path
from typing import Any

from scale.rewards.protocol import Scorer

# what works with the package as it comes
SCORERS = {
    "alignment": "scale.rewards.alignment:Alignment",
    "colorfulness": "scale.rewards.colorfulness:Colorfulness",
    "jpeg": "scale.rewards.jpeg:Jpeg",
    "symmetry": "scale.rewards.symmetry:Symmetry",
}
# what needs weights: each takes a folder or a hub id, and has a hub id of its own
MODELS = {
    "clipscore": "scale.rewards.clipscore:ClipScore",
    "hpsv2": "scale.rewards.hpsv2:HPSv2",
    "imagereward": "scale.rewards.imagereward:ImageReward",
    "laion-aesthetic": "scale.rewards.laion_aesthetic:LaionAesthetic",
    "pickscore": "scale.rewards.pickscore:PickScore",
    "vila": "scale.rewards.vila:Vila",
}
TAKE_A_MODEL = {"alignment", *MODELS}


def load_scorer(name: str, model: str | Path | None = None) -> Scorer:
    """The scorer of that name, with the weights of `model`: a folder (alignment: the judge's) or a hub id.

    Raises:
        ValueError: a name that no reward has; a model for a reward without one; no weights there.
    """
    check_reward(name, model)
    make: Any = scorer_class(name)
    return make() if model is None else make(model)


def scorer_class(name: str) -> type[Scorer]:
    """The class of a reward, which says what it is without its weights."""
    module, attribute = (SCORERS | MODELS)[name].split(":")
    return getattr(import_module(module), attribute)


def check_reward(name: str, model: str | Path | None = None) -> None:
    """ValueError for a name that no reward has, and for a model where the reward takes none; opens no file."""
    if name not in SCORERS | MODELS:
        raise ValueError(
            f"no reward {name!r}; the rewards are {', '.join(sorted(SCORERS))}; "
            f"with weights of their own {', '.join(sorted(MODELS))}"
        )
    if model is not None and name not in TAKE_A_MODEL:
        raise ValueError(
            f"the reward {name} takes no model, received {str(model)!r}; "
            f"those that do are {', '.join(sorted(TAKE_A_MODEL))}"
        )
