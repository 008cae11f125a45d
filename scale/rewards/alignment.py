"""Text-image alignment on the small world: a network that names what it sees, and how sure it is of the caption."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale.adapters.read import first_line, read
from scale.mini import JUDGE, world
from scale.rewards.protocol import Images, Scorer, Scores

SLOTS = 2  # the first object, and the second or nothing
COLOURS = (*world.COLOURS, "nothing")
SHAPES = (*world.SHAPES, "nothing")


class Judge(nn.Module):
    """A small convolutional network: images (n, 3, 64, 64) in [0, 1] -> logits (n, slots, colours + shapes)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64)
        self.body = nn.Sequential(*(layer for pair in pairwise(widths) for layer in _halve(*pair)))
        self.head = nn.Linear(64 * 8 * 8, SLOTS * (len(COLOURS) + len(SHAPES)))

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(2 * images - 1).flatten(1)
        return self.head(features).unflatten(1, (SLOTS, -1))


def _halve(channels: int, out: int) -> tuple[nn.Module, ...]:
    """Half the resolution, then a look at the neighbourhood."""
    first, second = nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.Conv2d(out, out, 3, padding=1)
    return first, nn.GroupNorm(8, out), nn.SiLU(), second, nn.SiLU()


def labels(prompt: str) -> Tensor:
    """(slots, 2): the colour and the shape that each slot should show."""
    things = list(world.parse(prompt))
    things += [world.Thing("nothing", "nothing")] * (SLOTS - len(things))
    return torch.tensor([[COLOURS.index(thing.colour), SHAPES.index(thing.shape)] for thing in things])


def split_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The colours' and the shapes' part of the judge's logits."""
    return logits[..., : len(COLOURS)], logits[..., len(COLOURS) :]


class Alignment(Scorer):
    """`4 p - 2` in [-2, 2], where p is the mean probability that the judge gives the caption's colours and shapes.

    Raises:
        ValueError: a prompt that is no caption of the small world; a folder without the judge's weights.
    """

    name = "alignment"
    range = (-2.0, 2.0)
    differentiable = True

    def __init__(self, folder: str | Path = JUDGE) -> None:
        path = Path(folder) / "judge.safetensors"
        if not path.is_file():
            raise ValueError(f"no judge at {path}; run `python -m scale.mini.build` to make one")
        self.judge, self.files = Judge(), (path,)
        try:
            self.judge.load_state_dict(read(path).tensors)
        except RuntimeError as error:
            raise ValueError(f"{path} holds no judge of the small world: {first_line(error)}") from error
        self.judge.eval().requires_grad_(False)

    def knows(self, prompt: str) -> bool:
        """Whether the prompt is a caption of the small world."""
        try:
            world.parse(prompt)
        except ValueError:
            return False
        return True

    def _score(self, images: Images, prompts: Sequence[str]) -> Scores:
        if images.shape[-2:] != (world.SIZE, world.SIZE):
            images = F.interpolate(images, (world.SIZE, world.SIZE), mode="bicubic", antialias=True).clamp(0, 1)
        self.judge.to(images.device)
        wanted = torch.stack([labels(prompt) for prompt in prompts]).to(images.device)
        right = [
            part.softmax(-1).gather(-1, wanted[..., i, None]).squeeze(-1)
            for i, part in enumerate(split_logits(self.judge(images)))
        ]
        # a slot that should be empty counts too, or a second object would go unpunished
        return 4 * torch.stack(right).mean((0, 2)) - 2
