"""The same expert in other factors: `python -m scale.mini.turn`, which made the shipped `colorfulness-turned`.

`B A = (B Q') (Q A)` for any orthogonal Q, so a turned adapter is the same model, and so is every soup of the products.
A soup of the factors is another: with a random Q its cross terms have mean zero, as those of adapters that began at
different A have, and at w = 1/2 a quarter of each expert is left.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from dbtheory.files import write_atomically
from scale import mini
from scale.adapters import FILE_NAMES

FILE = FILE_NAMES[0]
DOWN, UP = "lora_A", "lora_B"


@dataclass(frozen=True)
class Turn:
    """Write an adapter of the small world with its factors turned."""

    name: str = "colorfulness"
    """The shipped adapter."""
    out: Path = Path("build/turned")
    """Folder that receives the file."""
    seed: int = 0


def turned(tensors: dict[str, Tensor], generator: Generator) -> dict[str, Tensor]:
    """Every layer's factors by peft's names: A (rank, in, ...) to Q A, B (out, rank, ...) to B Q', Q uniform."""
    made = {}
    for name, down in tensors.items():
        if DOWN not in name:
            continue
        other = name.replace(DOWN, UP)
        up = tensors[other]
        basis, corner = torch.linalg.qr(torch.randn(len(down), len(down), generator=generator))
        turn = basis * corner.diagonal().sign()  # uniform over the orthogonal group (Mezzadri 2007)
        made[name] = torch.einsum("qr,ri...->qi...", turn, down.float()).to(down.dtype).contiguous()
        made[other] = torch.einsum("qr,or...->oq...", turn, up.float()).to(up.dtype).contiguous()
    return made


def main(options: Turn) -> None:
    """Read, turn, write."""
    tensors = turned(load_file(mini.ADAPTERS / options.name / FILE), Generator().manual_seed(options.seed))
    write_atomically(options.out / FILE, lambda path: save_file(tensors, path, {"format": "pt"}))


if __name__ == "__main__":
    main(tyro.cli(Turn, description=__doc__))
