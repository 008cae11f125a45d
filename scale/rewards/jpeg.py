"""JPEG compressibility: minus the size of the file."""

import io
from collections.abc import Sequence
from math import inf

import torch
from PIL import Image

from scale.rewards.protocol import Images, Scorer, Scores

QUALITY = 95


class Jpeg(Scorer):
    """Minus the size in kB (1000 bytes) of the image, rounded to 8 bits, as Pillow's JPEG of quality 95."""

    name = "jpeg"
    range = (-inf, 0.0)
    differentiable = False
    runs_on = "anywhere"

    def _score(self, images: Images, prompts: Sequence[str]) -> Scores:
        pixels = (255 * images.detach().clamp(0, 1)).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([-len(_encode(picture)) / 1000 for picture in pixels], device=images.device)


def _encode(picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "jpeg", quality=QUALITY)
    return buffer.getvalue()
