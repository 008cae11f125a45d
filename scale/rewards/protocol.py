"""What every scorer offers."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "n 3 height width"]
Scores = Float[Tensor, " n"]


@runtime_checkable
class Scorer(Protocol):
    """A reward of images: `score` is higher for better ones.

    `range` bounds the score (infinite where nothing does) and `differentiable` says whether gradients reach the pixels.
    """

    name: str
    range: tuple[float, float]
    differentiable: bool

    def score(self, images: Images, prompts: Sequence[str]) -> Scores:
        """Images (n, 3, H, W) in [0, 1] and their prompts -> scores (n,) float32."""
        ...


def check_images(images: Tensor, prompts: Sequence[str]) -> None:
    """ValueError unless images are (n, 3, H, W) in [0, 1], one prompt each."""
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
        raise ValueError(
            "a scorer takes images (n, 3, height, width) and n prompts, "
            f"received {tuple(images.shape)} and {len(prompts)}"
        )
    low, high = torch.aminmax(images.detach()) if len(images) else (torch.zeros(()), torch.ones(()))
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also catches NaN
        raise ValueError(f"images must lie in [0, 1], received values from {low:.3g} to {high:.3g}")
