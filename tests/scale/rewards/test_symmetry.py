"""Symmetry: numpy's own correlation, pictures whose score is known, and what must not matter."""

import numpy as np
import pytest
import torch
from torch import Tensor

from scale.rewards.symmetry import FLAT, Symmetry
from tests.scale.rewards.pictures import blocks


def score(pictures: Tensor) -> Tensor:
    return Symmetry().score(pictures, [""] * len(pictures))


def noise(n: int, height: int = 12, width: int = 17, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def correlation(picture: Tensor) -> float:
    """numpy's coefficient between a picture and its mirror, each channel's mean taken off first."""
    channels = picture.double().numpy()
    channels = channels - channels.mean((1, 2), keepdims=True)
    return float(np.corrcoef(channels.ravel(), np.fliplr(channels.transpose(1, 2, 0)).transpose(2, 0, 1).ravel())[0, 1])


def test_symmetry_against_numpy() -> None:
    """It is `numpy.corrcoef` of picture and mirror, for noise, blocks, and what lies between noise and its mirror."""
    for batch in (noise(4), noise(2, 7, 2), blocks(4, seed=5), noise(3) + 0.8 * noise(3).flip(3)):
        batch = batch / batch.max()
        expected = torch.tensor([correlation(picture) for picture in batch])
        torch.testing.assert_close(score(batch).double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_one_mean_for_all_channels_would_be_another_score() -> None:
    """The control: without each channel's own mean a red picture of noise would pass for symmetric."""
    red = 0.1 * noise(1) + torch.tensor([0.9, 0, 0])[:, None, None]
    pooled = np.corrcoef(red.numpy().ravel(), red.flip(3).numpy().ravel())[0, 1]
    assert pooled > 0.9
    assert abs(float(score(red))) < 0.5


def test_symmetry_of_known_pictures() -> None:
    """Mirror-symmetric 1, its own negative in the mirror -1, six rows even and two odd (6 - 2) / 8, one column 1."""
    half = noise(1, 8, 8)
    odd = torch.linspace(0, 1, 16).expand(1, 3, 8, 16)
    rows = torch.tensor([[1, 1], [-1, -1], [1, 1], [-1, -1], [1, 1], [-1, -1], [1, -1], [1, -1]])  # of mean 0
    assert float(score(torch.cat([half, half.flip(3)], 3))) == 1.0
    assert float(score(odd)) == pytest.approx(-1, abs=1e-6)
    assert float(score((0.5 + 0.25 * rows).expand(1, 3, 8, 2))) == pytest.approx(0.5, abs=1e-6)
    assert float(score(noise(1, 8, 1))) == 1.0


def test_brightness_and_contrast_do_not_matter() -> None:
    """Less contrast, more light in any channel, or the mirror image itself: the same score; a blur is another."""
    pictures = noise(3) / 2
    shift = torch.tensor([0.1, 0.3, 0.5])[:, None, None]
    for same in (pictures + shift, 0.3 * pictures, 1 - pictures, pictures.flip(3), pictures.flip(2)):
        torch.testing.assert_close(score(same), score(pictures), rtol=1e-4, atol=1e-5)
    blurred = torch.nn.functional.avg_pool2d(pictures, 3, stride=1)
    assert bool(((score(blurred) - score(pictures)).abs() > 1e-3).all())


@pytest.mark.parametrize("size", [8, 513])
def test_a_flat_picture_is_symmetric_and_has_no_gradient(size: int) -> None:
    """0/0 by the formula: 1 by definition, and a finite gradient, 0; black, or a colour whose mean is rounded."""
    colours = torch.tensor([[0, 0, 0], [0.1, 0.7, 1 / 3]])
    flat = colours[..., None, None].expand(2, 3, size, size).clone().requires_grad_()
    value = score(flat)
    value.sum().backward()
    assert flat.grad is not None
    assert bool((value == 1).all())
    assert bool((flat.grad == 0).all())


def test_the_least_mark_on_a_flat_picture_counts() -> None:
    """One pixel one step of 8 bits off is no flat picture: FLAT changes its score, 0 less 1/(n - 1), by under 1e-3."""
    n = 32 * 32
    marked = torch.full((1, 3, 32, 32), 0.5)
    marked[0, 0, 3, 4] += 1 / 255
    assert FLAT > 0
    assert float(score(marked)) == pytest.approx(-1 / (n - 1), abs=1e-3)


def test_the_gradient_is_the_derivative() -> None:
    """Finite differences in double precision agree."""
    pictures = noise(2, 4, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: Symmetry()._score(x, ["", ""]), (pictures,))
