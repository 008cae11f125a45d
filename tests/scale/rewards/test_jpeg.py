"""Compressibility against files on disk."""

from math import inf
from pathlib import Path

import torch
from PIL import Image

from scale.rewards.jpeg import QUALITY, Jpeg
from tests.scale.rewards.pictures import PROMPTS, blocks


def test_jpeg_against_files_on_disk(tmp_path: Path) -> None:
    """The score is minus the kilobytes of the file that Pillow writes at quality 95."""
    batch = blocks()
    for i, image in enumerate(batch):
        pixels = (255 * image).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg", quality=95)
    expected = [-(tmp_path / f"{i}.jpg").stat().st_size / 1000 for i in range(3)]
    assert QUALITY == 95
    torch.testing.assert_close(Jpeg().score(batch, PROMPTS), torch.tensor(expected))


def test_jpeg_prefers_simple_pictures() -> None:
    """A flat picture compresses better than blocks, and blocks better than noise."""
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    flat, block, noisy = Jpeg().score(torch.cat([torch.full_like(noise, 0.3), blocks(1), noise]), [""] * 3).tolist()
    assert noisy < block < flat < 0


def test_the_range_is_the_definition_s() -> None:
    """No file is smaller than nothing, and some are as large as one likes."""
    assert Jpeg.range == (-inf, 0.0)
