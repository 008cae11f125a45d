"""What a picture of the small world shows, by geometry alone: nothing is learnt, nothing is shared with the judge.

An object is a region far from the dull background: colourful, nearly black or nearly white. Its colour is the nearest
named one; its shape is the outline of `world` that covers it best (intersection over union) at equal area and centre.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw
from scipy import ndimage

from scale.mini import world

# the background spans at most 44 levels between its channels, and 53 to 207 in each; the dullest colour spans 115
CHROMA, DARK, BRIGHT = 80, 42, 221
SMALLEST = 30  # pixels; the smallest object, a star, has more than 100
SPLIT = 0.25  # a region of two colours, each with this share of it, is two objects that touch
SIDE, AREA, TILTS = 32, 200, 9  # of the templates: pixels, covered pixels, and angles in [-0.2, 0.2]
CLEAR = 0.7  # the least overlap that counts as a shape


class Found(NamedTuple):
    """One object: `x`, `y` of its centre in pixels, `overlap` in [0, 1] with the outline of `shape`."""

    colour: str
    shape: str
    overlap: float
    x: float
    y: float


def detect(image: np.ndarray) -> list[Found]:
    """The objects of a picture (64, 64, 3) uint8, from left to right; `shape` is "unclear" below an overlap of 0.7.

    Raises:
        ValueError: a picture of another size or type.
    """
    if image.shape != (world.SIZE, world.SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"the detector takes pictures of the small world, ({world.SIZE}, {world.SIZE}, 3) uint8; "
            f"received {image.shape} {image.dtype}"
        )
    pixels = image.astype(float)
    regions = _regions(pixels)
    if not regions:
        return []
    clear = ~_grow(np.logical_or.reduce(regions))
    if not clear.any():
        return []
    background = np.median(pixels[clear], axis=0)
    return sorted((_describe(pixels, region, background) for region in regions), key=lambda found: found.x)


def _regions(pixels: Float[np.ndarray, "h w 3"]) -> list[Bool[np.ndarray, "h w"]]:
    """Connected regions unlike any background; one of two colours is parted by the nearer colour."""
    low, high = pixels.min(-1), pixels.max(-1)
    labels, count = _label((high - low > CHROMA) | (high < DARK) | (low > BRIGHT))
    nearest = _nearest(pixels)
    regions = []
    for region in (labels == number for number in range(1, count + 1)):
        size = region.sum()
        if size < SMALLEST:
            continue
        shares = np.bincount(nearest[region], minlength=len(world.COLOURS)) / size
        large = np.flatnonzero(shares > SPLIT)
        parts = [region & (nearest == colour) for colour in large] if len(large) > 1 else [region]
        regions += [part for part in map(_largest, parts) if part.sum() >= SMALLEST]
    return regions


def _label(mask: Bool[np.ndarray, "h w"]) -> tuple[np.ndarray, int]:
    """The connected regions of a mask, numbered from 1, and how many there are."""
    found: Any = ndimage.label(mask)
    return found[0], int(found[1])


def _grow(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """With its edges: two pixels further."""
    return np.asarray(ndimage.binary_dilation(mask, iterations=2))


def _largest(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    labels, count = _label(mask)
    return mask if count < 2 else labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])


def _nearest(pixels: Float[np.ndarray, "*n 3"]) -> np.ndarray:
    """Index of the nearest named colour."""
    return ((pixels[..., None, :] - np.array(list(world.COLOURS.values()))) ** 2).sum(-1).argmin(-1)


def _describe(
    pixels: Float[np.ndarray, "h w 3"], region: Bool[np.ndarray, "h w"], background: Float[np.ndarray, "3"]
) -> Found:
    """Colour by the region's inside; shape by how much of each pixel the object covers, edges included."""
    inside = np.asarray(ndimage.binary_erosion(region))
    colour = np.median(pixels[np.where(inside.any(), inside, region)], axis=0)
    towards = colour - background
    # a pixel on the edge mixes both colours: where it lies between them is the share that is covered
    cover = np.clip((pixels - background) @ towards / (towards @ towards), 0, 1)
    cover = np.where(_grow(region), cover, 0)
    cover = np.where(cover > 0.25, cover, 0)
    rows, columns = np.indices(cover.shape)
    y, x = (float((place * cover).sum() / cover.sum()) for place in (rows, columns))
    overlaps = _overlaps(cover, x, y)
    best = int(overlaps.argmax())
    shape = world.SHAPES[best] if overlaps[best] >= CLEAR else "unclear"
    return Found(list(world.COLOURS)[int(_nearest(colour[None])[0])], shape, float(overlaps[best]), x, y)


def _overlaps(cover: Float[np.ndarray, "h w"], x: float, y: float) -> Float[np.ndarray, " shapes"]:
    """The best intersection over union with each shape over its tilts, once centred and scaled to equal area."""
    zoom = math.sqrt(cover.sum() / AREA)
    middle = (SIDE - 1) / 2
    offset: Any = (y - zoom * middle, x - zoom * middle)  # a number for each axis, which its stubs forget
    seen = ndimage.affine_transform(cover, np.array([zoom, zoom]), offset, (SIDE, SIDE), order=1)
    bank = _templates()
    both, either = np.minimum(bank, seen).sum((-2, -1)), np.maximum(bank, seen).sum((-2, -1))
    return (both / either).max(1)


@cache
def _templates() -> Float[np.ndarray, "shapes tilts side side"]:
    """Every shape at every tilt, of one area, its centre of mass in the middle."""
    tilts = np.linspace(-0.2, 0.2, TILTS)
    return np.stack([np.stack([_template(shape, tilt) for tilt in tilts]) for shape in world.SHAPES])


def _template(shape: str, tilt: float) -> Float[np.ndarray, "side side"]:
    fine = 8
    outline = world.outline(shape, 1.0, tilt)
    hole = world.outline("circle", 0.5, 0.0) if shape == "ring" else None
    area, centre = _moments(outline)
    if hole is not None:
        area -= _moments(hole)[0]
    outlines = [outline] if hole is None else [outline, hole]
    stencil = Image.new("L", (SIDE * fine, SIDE * fine))
    for polygon, fill in zip(outlines, (255, 0), strict=False):
        placed = ((polygon - centre) * math.sqrt(AREA / area) + SIDE / 2) * fine
        ImageDraw.Draw(stencil).polygon([(x, y) for x, y in placed], fill=fill)
    return np.asarray(stencil.resize((SIDE, SIDE), Image.Resampling.BOX)) / 255


def _moments(polygon: Float[np.ndarray, "k 2"]) -> tuple[float, Float[np.ndarray, "2"]]:
    """Area and centre of mass of a polygon (the shoelace formula)."""
    after = np.roll(polygon, -1, axis=0)
    cross = polygon[:, 0] * after[:, 1] - polygon[:, 1] * after[:, 0]
    area = cross.sum() / 2
    return abs(float(area)), ((polygon + after) * cross[:, None]).sum(0) / (6 * area)
