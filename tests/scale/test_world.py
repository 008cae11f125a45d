"""The small world: captions, splits, renders."""

from itertools import product

import numpy as np
import pytest

from scale.mini import world
from scale.mini.world import COLOURS, SHAPES, SIZE, Thing, caption, parse, render

SINGLES = [(Thing(*pair),) for pair in product(COLOURS, SHAPES)]
FIRST_HELD_OUT = ("a white square and a white star", "a white cross and a red triangle")
FIRST_TRAIN = ("a blue ring and a red triangle", "a red square and a purple square")
PAIRS = [(a[0], b[0]) for a, b in product(SINGLES, SINGLES) if a != b]


class Still(np.random.Generator):
    """Draws that never vary: the middle of every range, no noise, the first kind of background (flat)."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def uniform(self, low=0.0, high=1.0, size=None):
        return np.broadcast_to((np.asarray(low) + np.asarray(high)) / 2, size or np.shape(low))[()]

    def normal(self, loc=0.0, scale=1.0, size=None):
        return np.full(size, loc)

    def choice(self, a, *args, **kwargs):
        return 0


def test_the_words_are_the_issue_s() -> None:
    """Eight colours and eight shapes, the ones that the prompts of the project use."""
    assert set(COLOURS) == {"red", "green", "blue", "yellow", "purple", "orange", "black", "white"}
    assert set(SHAPES) == {"circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart"}


def test_captions_parse_back() -> None:
    """Every caption of the world parses to the things that it was made of, so alignment judges the right ones."""
    for things in [*SINGLES, *PAIRS]:
        assert parse(caption(things)) == things


@pytest.mark.parametrize(
    ("text", "things"),
    [
        ("a red colored circle", (Thing("red", "circle"),)),
        ("a red circle and a blue square", (Thing("red", "circle"), Thing("blue", "square"))),
        ("An orange ring.", (Thing("orange", "ring"),)),
        ("  a red circle ", (Thing("red", "circle"),)),
    ],
)
def test_captions_as_users_write_them(text: str, things: tuple[Thing, ...]) -> None:
    """The two forms of the issue, and harmless variations of them."""
    assert parse(text) == things


@pytest.mark.parametrize(
    "text",
    ["", "circle", "a circle", "red circle", "a pink circle", "a red dog", "a red circle and", "a red circle, a star",
     "a red circle and a red star and a red ring", "a red colored colored circle", "../../etc/passwd"],
)  # fmt: skip
def test_other_texts_are_refused(text: str) -> None:
    """What the world cannot show is a ValueError, not a picture of something else."""
    with pytest.raises(ValueError, match="small world"):
        parse(text)


def test_splits_are_disjoint_and_whole() -> None:
    """Training and held-out captions share nothing and together are all captions, each once, in a fixed order."""
    train, held_out = world.train_prompts(), world.held_out_prompts()
    assert len(held_out) == 400
    assert not set(train) & set(held_out)
    assert sorted([*train, *held_out]) == sorted(map(caption, [*SINGLES, *PAIRS]))
    assert sum(len(parse(prompt)) == 1 for prompt in held_out) == 8


def test_the_splits_never_change() -> None:
    """Shipped weights were trained on this split: another one would make held-out prompts a lie."""
    assert world.held_out_prompts()[:2] == FIRST_HELD_OUT
    assert world.train_prompts()[:2] == FIRST_TRAIN


def test_every_word_is_trained() -> None:
    """Held out are combinations, not words: each colour and each shape occurs in the training captions."""
    things = {thing for prompt in world.train_prompts() for thing in parse(prompt)}
    assert {thing.colour for thing in things} == set(COLOURS)
    assert {thing.shape for thing in things} == set(SHAPES)


def test_renders_depend_on_the_generator_alone() -> None:
    """Equal seeds give equal pictures, other seeds other ones: (64, 64, 3) bytes."""
    first, again, other = (render(PAIRS[0], np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (SIZE, SIZE, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "ring"])
@pytest.mark.parametrize("colour", COLOURS)
def test_an_object_has_its_colour_at_its_centre(colour: str, shape: str) -> None:
    """Without jitter, the middle of the picture shows the caption's colour exactly."""
    picture = render((Thing(colour, shape),), Still())
    assert tuple(picture[SIZE // 2, SIZE // 2]) == COLOURS[colour]


def test_a_ring_has_its_colour_around_a_hole() -> None:
    """A ring's middle shows the background, and its band the colour: at 0.75 of the mean radius 0.28."""
    picture = render((Thing("red", "ring"),), Still())
    middle, band = SIZE // 2, SIZE // 2 + round(0.75 * 0.28 * SIZE)
    assert tuple(picture[middle, middle]) == tuple(picture[0, 0])
    assert tuple(picture[middle, band]) == COLOURS["red"]


def test_the_first_of_two_is_on_the_left() -> None:
    """ "a red circle and a blue square" has the red one on the left."""
    picture = render((Thing("red", "circle"), Thing("blue", "square")), Still())
    left, right = round(0.27 * SIZE), round(0.73 * SIZE)
    assert tuple(picture[SIZE // 2, left]) == COLOURS["red"]
    assert tuple(picture[SIZE // 2, right]) == COLOURS["blue"]


def test_shapes_differ() -> None:
    """No two shapes draw the same picture, or their captions would not be alike in meaning alone."""
    pictures = [render((Thing("red", shape),), Still()).tobytes() for shape in SHAPES]
    assert len(set(pictures)) == len(SHAPES)
