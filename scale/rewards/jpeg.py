"""JPEG compressibility: minus the size of the file."""

import io
from collections.abc import Sequence
from math import inf

import torch
from PIL import Image

from scale.rewards.protocol import Images, Scores, check_images

QUALITY = 95


class Jpeg:
    """Minus the size in kB (1000 bytes) of a JPEG at quality 95, as Pillow writes it."""

    name = "jpeg"
    range = (-inf, 0.0)
    differentiable = False

    def score(self, images: Images, prompts: Sequence[str]) -> Scores:
        """Images (n, 3, H, W) in [0, 1], rounded to 8 bits -> (n,); the prompts play no part."""
        check_images(images, prompts)
        pixels = (255 * images.detach().float().clamp(0, 1)).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([-len(_encode(picture)) / 1000 for picture in pixels], device=images.device)


def _encode(picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "jpeg", quality=QUALITY)
    return buffer.getvalue()
