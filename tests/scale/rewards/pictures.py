"""Pictures to score, and a judge of random weights."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_model
from torch import Tensor

from scale.rewards.alignment import Alignment, Judge

PROMPTS = ["a red colored circle", "a red circle and a blue square", "an orange ring and a white star"]


def blocks(n: int = 3, size: int = 64, seed: int = 0) -> Tensor:
    """Random blocks of colour (n, 3, size, size)."""
    small = torch.rand(n, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(seed))
    return small.repeat_interleave(8, 2).repeat_interleave(8, 3)


def random_judge(folder: Path) -> Alignment:
    """The scorer with a judge of random weights, stored in half precision as the shipped one is."""
    torch.manual_seed(0)
    save_model(Judge().half(), str(folder / "judge.safetensors"))
    return Alignment(folder)


def copies(files: Iterable[Path | str], folder: Path) -> Path:
    """A folder with these files alone: a scorer's `files` must suffice to make it again."""
    folder.mkdir()
    for file in files:
        shutil.copy(file, folder)
    return folder
