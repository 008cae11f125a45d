"""Colorfulness against the paper's formula, written again from its text."""

from math import inf

import numpy as np
import torch

from scale.rewards.colorfulness import Colorfulness
from tests.scale.rewards.pictures import blocks


def hasler_suesstrunk(picture: np.ndarray) -> float:
    """M3 of the paper, sec. 6, written from its text: picture (H, W, 3) in 0..255."""
    r, g, b = (picture[..., i].astype(np.float64).ravel() for i in range(3))
    rg, yb = r - g, 0.5 * (r + g) - b
    sigma = np.sqrt(np.std(rg) ** 2 + np.std(yb) ** 2)
    mu = np.sqrt(np.mean(rg) ** 2 + np.mean(yb) ** 2)
    return sigma + 0.3 * mu


def test_colorfulness_against_the_paper() -> None:
    """The score is the paper's M3 by hundred, computed here by numpy from the paper's text."""
    batch = blocks(5, seed=3)
    expected = [hasler_suesstrunk(255 * image.permute(1, 2, 0).numpy()) / 100 for image in batch]
    torch.testing.assert_close(Colorfulness().score(batch, [""] * 5), torch.tensor(expected).float())


def test_colorfulness_of_known_pictures() -> None:
    """Greys have none; one flat colour has the shift alone; red beside cyan has spread too (by hand)."""
    grey = torch.linspace(0, 1, 16).expand(3, 16, 16)
    red = torch.zeros(3, 16, 16)
    red[0] = 1
    halves = torch.cat([red[..., :8], 1 - red[..., 8:]], -1)
    scores = Colorfulness().score(torch.stack([grey, red, halves]), [""] * 3)
    flat = 0.3 * 255 * 1.25**0.5 / 100  # rg = 255, yb = 127.5
    mixed = 255 * 1.25**0.5 / 100  # rg = +-255, yb = +-127.5: spread alone, no shift
    torch.testing.assert_close(scores, torch.tensor([0.0, flat, mixed]), rtol=1e-5, atol=1e-5)


def test_a_grey_image_has_a_finite_gradient() -> None:
    """The root has no derivative at zero: without care one grey image would turn all training into NaN."""
    grey = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
    Colorfulness().score(grey, [""]).sum().backward()
    assert grey.grad is not None
    assert bool(grey.grad.isfinite().all())


def test_the_range_is_the_definition_s() -> None:
    """Roots are not negative, and nothing is said of how colourful a picture can be."""
    assert Colorfulness.range == (0.0, inf)
