"""Sums of rewards: their scores, gradients, ranges and names are what the parts say."""

from collections.abc import Sequence
from math import inf, nan

import numpy as np
import pytest
import torch
from torch import Tensor

from scale.rewards import Scorer
from scale.rewards.protocol import Mix
from tests.scale.rewards.pictures import PROMPTS, blocks


class Channel(Scorer):
    """The mean of one channel; it keeps how many images it was asked for."""

    differentiable = True

    def __init__(self, index: int, name: str, low: float = 0.0, high: float = 1.0, batch_size: int = 64) -> None:
        self.index, self.name, self.range, self.batch_size = index, name, (low, high), batch_size
        self.asked: list[int] = []

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.asked.append(len(images))
        return images[:, self.index].mean((1, 2))

    def knows(self, prompt: str) -> bool:
        return self.name in prompt


class Rounded(Channel):
    differentiable = False

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return super()._score(images.detach(), prompts).round()


RED, GREEN, BLUE = Channel(0, "red"), Channel(1, "green"), Channel(2, "blue")
SUMS = {
    "0.3*red + 0.7*green": (0.3 * RED + GREEN * 0.7, (0.3, 0.7, 0.0), 0.0),
    "red - 19": (RED - 19, (1, 0, 0), -19),
    "-red + 2": (2 - RED, (-1, 0, 0), 2),
    "-3*blue": (-(3 * BLUE), (0, 0, -3), 0),
    "red + green - blue": (sum([RED, GREEN]) - BLUE, (1, 1, -1), 0),
    "0.5*red + 0.5*green - 9.5": (0.5 * (RED + GREEN - 19), (0.5, 0.5, 0), -9.5),
    "2*red - 0.5*green + 0.25*blue + 1": (2 * RED - (0.5 * (GREEN - 0.5 * BLUE - 2)), (2, -0.5, 0.25), 1),
    "red - red": (RED - RED, (0, 0, 0), 0),
    "0.1*red": (np.float64(0.1) * RED, (0.1, 0, 0), 0),
}


@pytest.mark.parametrize("name", SUMS)
def test_operators_make_the_sum_that_they_read_as(name: str) -> None:
    """Scores, and their gradients, are those of the weights by hand on the channels' means; the name says them."""
    mix, weights, shift = SUMS[name]
    assert isinstance(mix, Mix)
    assert mix.name == name
    images = blocks().requires_grad_()
    scores = mix.score(images, PROMPTS)
    expected = images.detach().double().mean((2, 3)) @ torch.tensor(weights, dtype=torch.float64) + shift
    torch.testing.assert_close(scores.detach().double(), expected, rtol=1e-6, atol=1e-6)
    scores.sum().backward()
    assert images.grad is not None
    by_hand = torch.tensor(weights, dtype=torch.float32)[:, None, None] / (64 * 64)
    torch.testing.assert_close(images.grad, by_hand.expand_as(images))


@pytest.mark.parametrize(
    ("weights", "shift", "bounds"),
    [
        ((0.5, 0.5), 0.0, (-0.5, 1.5)),
        ((2.0, -1.0), 1.0, (-3.0, 3.0)),
        ((-1.0, -1.0), 0.0, (-3.0, 1.0)),
        ((0.0, 1.0), 0.0, (0.0, 2.0)),
    ],
)
def test_the_range_of_a_mix(weights: tuple[float, float], shift: float, bounds: tuple[float, float]) -> None:
    """Ranges [-1, 1] and [0, 2] add as intervals do: a negative weight turns its interval round."""
    parts = Channel(0, "a", -1.0, 1.0), Channel(1, "b", 0.0, 2.0)
    assert Mix(list(zip(weights, parts, strict=True)), shift).range == bounds


def test_infinite_ranges() -> None:
    """A negative weight turns an infinite bound round, a zero weight makes it harmless, and none makes NaN."""
    up, down = Channel(0, "up", 0.0, inf), Channel(1, "down", -inf, 0.0)
    assert (up + down).range == (-inf, inf)
    assert (up - down).range == (0.0, inf)
    assert (1 - up - -1 * down).range == (-inf, 1.0)
    assert (0 * up + RED).range == (0.0, 1.0)
    assert (up - up).range == (-inf, inf)


def test_a_mix_is_as_differentiable_as_its_worst_part() -> None:
    """One part without gradient leaves the sum with half of one, which is none."""
    assert (RED + GREEN).differentiable
    assert not (RED + Rounded(1, "rounded")).differentiable


def test_a_mix_knows_what_all_its_parts_know() -> None:
    """A sum has no value where one part has none."""
    assert (RED + BLUE).knows("a red circle and a blue square")
    assert not (RED + BLUE).knows("a red circle and a green square")


def test_every_part_keeps_its_own_batches() -> None:
    """Three images: the part with batches of two sees 2 and 1, the one with batches of one sees 1, 1, 1."""
    two, one = Channel(0, "two", batch_size=2), Channel(1, "one", batch_size=1)
    (two + one).score(blocks(), PROMPTS)
    assert two.asked == [2, 1]
    assert one.asked == [1, 1, 1]


def test_a_part_that_fails_is_named() -> None:
    """The error is the part's, not the sum's."""

    class Broken(Channel):
        def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return super()._score(images, prompts) * nan

    with pytest.raises(ValueError, match="the reward broken gave NaN"):
        (RED + 0.5 * Broken(1, "broken")).score(blocks(), PROMPTS)
    with pytest.raises(ValueError, match=r"the reward 1e\+300\*red gave NaN or infinity"):
        (1e300 * RED).score(blocks(), PROMPTS)


@pytest.mark.parametrize("number", [nan, inf, -inf])
def test_numbers_that_are_none_are_refused(number: float) -> None:
    """NaN and infinity as weight or shift, products beyond all numbers, and a sum of nothing: ValueError."""
    for make in (
        lambda: number * RED,
        lambda: RED + number,
        lambda: RED - number,
        lambda: Mix([(1.0, RED)], number),
        lambda: 1e200 * (1e200 * RED),
        lambda: Mix([]),
    ):
        with pytest.raises(ValueError, match="finite weights and shift"):
            make()


def test_other_things_do_not_add_up() -> None:
    """Rewards and words, or rewards times rewards, are a TypeError as python's own."""
    for make in (lambda: RED + "green", lambda: "0.3" * RED, lambda: RED * GREEN):  # pyright: ignore
        with pytest.raises(TypeError):
            make()
