"""The small world: eight colours and eight shapes, one or two objects, 64 x 64 pixels.

A caption is "a red colored circle" (one object, near the centre) or "a red circle and a blue square" (the first object
on the left, the second on the right). `render` draws a caption; `train_prompts` and `held_out_prompts` split all
captions into two disjoint lists by a fixed seed.
"""

import math
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
SUPERSAMPLING = 3
HELD_OUT_SINGLES, HELD_OUT_PAIRS = 8, 392

COLOURS = {
    "red": (215, 30, 35), "green": (30, 150, 50), "blue": (30, 70, 210), "yellow": (245, 220, 40),
    "purple": (130, 45, 160), "orange": (245, 135, 25), "black": (15, 15, 15), "white": (245, 245, 245),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart")


class Thing(NamedTuple):
    """One object of a caption."""

    colour: str
    shape: str


def caption(things: tuple[Thing, ...]) -> str:
    """The caption of one or two things."""
    if len(things) == 1:
        return f"{_article(things[0].colour)} colored {things[0].shape}"
    return " and ".join(f"{_article(thing.colour)} {thing.shape}" for thing in things)


def _article(colour: str) -> str:
    return f"an {colour}" if colour[0] in "aeiou" else f"a {colour}"


def parse(prompt: str) -> tuple[Thing, ...]:
    """The things that a caption of this world names; ValueError for any other text."""
    things = []
    for part in prompt.lower().strip().rstrip(".").replace(" colored ", " ").split(" and "):
        words = part.split()
        if len(words) != 3 or words[0] not in ("a", "an") or words[1] not in COLOURS or words[2] not in SHAPES:
            raise ValueError(
                f"the prompt {prompt!r} is not a caption of the small world; write 'a red colored circle' or "
                f"'a red circle and a blue square' with colours {', '.join(COLOURS)} and shapes {', '.join(SHAPES)}"
            )
        things.append(Thing(words[1], words[2]))
    if len(things) > 2:
        raise ValueError(f"the prompt {prompt!r} names {len(things)} objects; the small world holds one or two")
    return tuple(things)


@cache
def _split() -> tuple[tuple[str, ...], tuple[str, ...]]:
    every = [Thing(*pair) for pair in product(COLOURS, SHAPES)]
    singles = [caption((thing,)) for thing in every]
    pairs = [caption(both) for both in product(every, every) if both[0] != both[1]]
    rng = np.random.default_rng(2026)
    rng.shuffle(singles)
    rng.shuffle(pairs)
    held_out = singles[:HELD_OUT_SINGLES] + pairs[:HELD_OUT_PAIRS]
    train = singles[HELD_OUT_SINGLES:] + pairs[HELD_OUT_PAIRS:]
    rng.shuffle(held_out)
    rng.shuffle(train)
    return tuple(train), tuple(held_out)


def train_prompts() -> tuple[str, ...]:
    """The captions that the base model and the experts were trained on, in a fixed shuffled order."""
    return _split()[0]


def held_out_prompts() -> tuple[str, ...]:
    """400 captions that no training picture shows, in a fixed shuffled order."""
    return _split()[1]


def render(things: tuple[Thing, ...], rng: np.random.Generator) -> np.ndarray:
    """Draw things on a random background: (64, 64, 3) uint8. `rng` decides background, sizes, places and tilts."""
    big = SIZE * SUPERSAMPLING
    image = Image.fromarray(_background(big, rng))
    draw = ImageDraw.Draw(image)
    centres = [0.5] if len(things) == 1 else [0.27, 0.73]
    radius = (0.22, 0.34) if len(things) == 1 else (0.15, 0.21)
    for thing, centre in zip(things, centres, strict=True):
        x, y = (np.array([centre, 0.5]) + rng.uniform((-0.03, -0.12), (0.03, 0.12))) * big
        polygon = outline(thing.shape, rng.uniform(*radius) * big, rng.uniform(-0.2, 0.2))
        shade = np.clip(np.array(COLOURS[thing.colour]) + rng.normal(0, 6, 3), 0, 255).astype(int)
        hole = outline("circle", 0.5 * float(np.abs(polygon).max()), 0.0) if thing.shape == "ring" else None
        mask = Image.new("L", image.size)
        stencil = ImageDraw.Draw(mask)
        stencil.polygon([(x + dx, y + dy) for dx, dy in polygon], fill=255)
        if hole is not None:
            stencil.polygon([(x + dx, y + dy) for dx, dy in hole], fill=0)
        draw.bitmap((0, 0), mask, fill=tuple(int(v) for v in shade))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def _background(size: int, rng: np.random.Generator) -> np.ndarray:
    """A dull mid-tone: flat, a gradient, stripes or a checker; never a colour that an object may have."""
    base = rng.uniform(95, 165) + rng.uniform(-22, 22, 3)
    v, u = np.mgrid[0:size, 0:size] / size
    angle, count = rng.uniform(0, math.pi), rng.integers(2, 5)
    along = math.cos(angle) * u + math.sin(angle) * v
    across = math.cos(angle) * v - math.sin(angle) * u
    stripes = np.sign(np.sin(2 * math.pi * count * along))
    checker = stripes * np.sign(np.sin(2 * math.pi * count * across))
    kinds = (np.zeros_like(u), 2 * along - 1, stripes, checker)
    kind = rng.choice(4, p=(0.3, 0.3, 0.2, 0.2))
    pattern = kinds[kind] * rng.uniform(6, 20)
    return np.clip(base + pattern[..., None], 0, 255).astype(np.uint8)


def outline(shape: str, radius: float, tilt: float) -> np.ndarray:
    """The polygon (k, 2) of a shape about the origin, y downwards, inscribed in about `radius`."""
    turn = np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])
    return radius * _unit_outline(shape) @ turn.T


@cache
def _unit_outline(shape: str) -> np.ndarray:
    if shape in ("circle", "ring"):
        return _polar(np.linspace(0, 2 * math.pi, 65)[:-1], 1.0)
    if shape == "square":
        return 0.85 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    if shape == "diamond":
        return np.array([(0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0)])
    if shape == "triangle":
        return _polar(-math.pi / 2 + np.arange(3) * 2 * math.pi / 3, 1.15)
    if shape == "star":
        return _polar(-math.pi / 2 + np.arange(10) * math.pi / 5, np.where(np.arange(10) % 2, 0.45, 1.15))
    if shape == "cross":
        a, b = 0.33, 1.0
        return np.array([(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)])  # fmt: skip  # noqa: E501
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 65)[:-1]
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack((16 * np.sin(t) ** 3, -y - 2.5), 1) / 15
    raise ValueError(f"unknown shape {shape!r}; the small world has {', '.join(SHAPES)}")


def _polar(angles: np.ndarray, radius: float | np.ndarray) -> np.ndarray:
    return np.stack((np.cos(angles), np.sin(angles)), 1) * np.broadcast_to(radius, angles.shape)[:, None]
