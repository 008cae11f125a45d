"""GenEval's checks on the small world: does a picture show what its caption says, seen by the detector alone.

The tags are GenEval's (Ghosh et al. 2023), as far as this world has them. Captions of one object answer
`single_object` (its shape is there), `colors` (in its colour) and `counting`; captions of two answer `two_object`
(both shapes are there), `color_attr` (each in its colour), `position` (the first left of the second) and `counting`
(exactly as many objects as the caption names).
"""

from collections.abc import Iterable, Sequence
from itertools import permutations

import numpy as np
import pandas as pd

from scale.mini import world
from scale.mini.detector import Found, detect

SINGLE = ("single_object", "colors", "counting")
PAIR = ("two_object", "color_attr", "position", "counting")
TAGS = ("single_object", "two_object", "colors", "color_attr", "position", "counting")


def check(images: Iterable[np.ndarray], prompts: Sequence[str]) -> pd.DataFrame:
    """One row an image (64, 64, 3) uint8, one nullable boolean column a tag; NA where the caption has no such tag.

    Raises:
        ValueError: a prompt that is no caption of the small world, a picture of another size, or another number of
            pictures than of prompts.
    """
    wanted = [world.parse(prompt) for prompt in prompts]
    rows = [answers(detect(image), things) for image, things in zip(images, wanted, strict=True)]
    return pd.DataFrame(rows, columns=list(TAGS)).astype("boolean")


def answers(found: Sequence[Found], things: Sequence[world.Thing]) -> dict[str, bool]:
    """Each tag of a caption, and whether what was found satisfies it."""
    shapes = [pair for pair in permutations(found, len(things)) if _shapes(pair, things)]
    exact = [pair for pair in shapes if _colours(pair, things)]
    counted = len(found) == len(things)
    if len(things) == 1:
        return {"single_object": bool(shapes), "colors": bool(exact), "counting": counted}
    # shapes tell the two apart; where both have one shape, their colours do
    ordered = exact if things[0].shape == things[1].shape else shapes
    left = any(first.x < second.x for first, second in ordered)
    return {"two_object": bool(shapes), "color_attr": bool(exact), "position": left, "counting": counted}


def _shapes(pair: Sequence[Found], things: Sequence[world.Thing]) -> bool:
    return all(one.shape == thing.shape for one, thing in zip(pair, things, strict=True))


def _colours(pair: Sequence[Found], things: Sequence[world.Thing]) -> bool:
    return all(one.colour == thing.colour for one, thing in zip(pair, things, strict=True))
