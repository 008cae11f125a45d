"""The detector names what renders show, whatever the background, and refuses what they do not show."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from scale.mini import world
from scale.mini.detector import Found, detect
from scale.mini.geneval import TAGS, answers, check
from tests.chance import FALSE_ALARM

EVERY = [world.Thing(colour, shape) for colour in world.COLOURS for shape in world.SHAPES]
PICTURES = 300
COLOURS_RIGHT, SHAPES_RIGHT = 0.97, 0.95  # at least; all 3,000 objects of a larger trial were right


@pytest.fixture(scope="module")
def renders() -> tuple[list[tuple[world.Thing, ...]], list[np.ndarray]]:
    """Fresh renders, half of them of two things."""
    rng = np.random.default_rng(11)
    things = [tuple(EVERY[i] for i in rng.choice(len(EVERY), 1 + k % 2, replace=False)) for k in range(PICTURES)]
    return things, [world.render(each, rng) for each in things]


def too_few(right: int, of: int, share: float) -> bool:
    """Whether so few right answers contradict a share of `share`, at the stated false-alarm level."""
    return bool(stats.binom.cdf(right, of, share) < FALSE_ALARM)


def test_colours_shapes_and_counts_of_renders(renders: tuple[list[tuple[world.Thing, ...]], list[np.ndarray]]) -> None:
    """At least 97 % of colours and 95 % of shapes are named right, and 97 % of pictures counted right."""
    things, images = renders
    found = [detect(image) for image in images]
    counted = [(seen, wanted) for seen, wanted in zip(found, things, strict=True) if len(seen) == len(wanted)]
    assert not too_few(len(counted), PICTURES, 0.97)
    pairs = [pair for seen, wanted in counted for pair in zip(seen, wanted, strict=True)]
    assert not too_few(sum(a.colour == b.colour for a, b in pairs), len(pairs), COLOURS_RIGHT)
    assert not too_few(sum(a.shape == b.shape for a, b in pairs), len(pairs), SHAPES_RIGHT)


def test_right_captions_pass_and_wrong_ones_fail(
    renders: tuple[list[tuple[world.Thing, ...]], list[np.ndarray]],
) -> None:
    """Every tag passes on the renders' captions; the control, the captions of other things, fails nearly always."""
    things, images = renders
    right: Any = check(images, [world.caption(each) for each in things])
    assert list(right.columns) == list(TAGS)
    for tag in TAGS:
        answered = right[tag].dropna()
        assert len(answered) >= PICTURES // 2
        assert not too_few(int(answered.sum()), len(answered), 0.95)
    wrong: Any = check(images, [world.caption(tuple(_other(thing) for thing in each)) for each in things])
    for tag in ("single_object", "two_object", "colors", "color_attr"):
        answered = wrong[tag].dropna()
        assert int(answered.sum()) <= 0.05 * len(answered)


def _other(thing: world.Thing) -> world.Thing:
    """Another colour and another shape."""
    colours, shapes = list(world.COLOURS), world.SHAPES
    return world.Thing(colours[(colours.index(thing.colour) + 1) % 8], shapes[(shapes.index(thing.shape) + 1) % 8])


def objects(*words: str) -> list[Found]:
    """What would be found: "red circle", from left to right."""
    split = (word.split() for word in words)
    return [Found(colour, shape, 0.9, 10.0 + 20 * k, 32.0) for k, (colour, shape) in enumerate(split)]


@pytest.mark.parametrize(
    ("caption", "found", "failed"),
    [
        ("a red circle and a blue square", ["red circle", "blue square"], []),
        ("a red circle and a blue square", ["blue square", "red circle"], ["position"]),
        ("a red circle and a blue square", ["blue circle", "red square"], ["color_attr"]),
        ("a red circle and a blue square", ["red circle"], ["two_object", "color_attr", "position", "counting"]),
        ("a red circle and a blue square", ["red circle", "blue square", "red star"], ["counting"]),
        ("a red circle and a blue circle", ["blue circle", "red circle"], ["position"]),
        ("a red circle and a blue circle", ["red circle", "blue circle"], []),
        ("a red colored circle", ["red circle"], []),
        ("a red colored circle", ["blue circle"], ["colors"]),
        ("a red colored circle", ["red square"], ["single_object", "colors"]),
        ("a red colored circle", ["red circle", "red circle"], ["counting"]),
        ("a red colored circle", [], ["single_object", "colors", "counting"]),
    ],
)
def test_the_checks_by_hand(caption: str, found: Sequence[str], failed: Sequence[str]) -> None:
    """Exactly these tags of the caption fail."""
    answered = answers(objects(*found), world.parse(caption))
    assert [tag for tag, passed in answered.items() if not passed] == failed


def test_an_empty_picture_and_a_full_one_hold_nothing() -> None:
    """No object on a bare background, none where there is no background; nothing is divided by 0."""
    assert detect(np.full((64, 64, 3), 120, np.uint8)) == []
    assert detect(np.full((64, 64, 3), 255, np.uint8)) == []


def test_two_objects_that_touch_are_two() -> None:
    """A red half beside a blue half is parted by colour."""
    image = np.full((64, 64, 3), 120, np.uint8)
    image[20:40, 12:32], image[20:40, 32:52] = world.COLOURS["red"], world.COLOURS["blue"]
    assert [(one.colour, one.shape) for one in detect(image)] == [("red", "square"), ("blue", "square")]


def test_what_resembles_no_shape_is_unclear() -> None:
    """A thin bar overlaps no outline by 70 %."""
    image = np.full((64, 64, 3), 120, np.uint8)
    image[30:34, 5:60] = world.COLOURS["green"]
    assert [(one.colour, one.shape) for one in detect(image)] == [("green", "unclear")]


def test_other_pictures_are_refused() -> None:
    """A size or a type that is not this world's, and a prompt that is no caption."""
    with pytest.raises(ValueError, match="64, 64, 3"):
        detect(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="is not a caption"):
        check([np.zeros((64, 64, 3), np.uint8)], ["a cat"])
