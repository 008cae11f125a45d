"""Training the judge of alignment on clean renders."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale.mini import base
from scale.mini.loop import fit
from scale.rewards.alignment import Judge, labels, split_logits

TEST_PICTURES = 2_000


def train_judge(work: Path, steps: int, pictures: int = base.PICTURES, seed: int = 0) -> tuple[Judge, float]:
    """The judge, and the share of held-out renders of which it names every colour and shape right."""
    images, captions = base.pictures(work / "judge.npz", pictures, wrong_colours=0.0, seed=seed + 1)
    wanted = torch.stack([labels(caption) for caption in captions])
    torch.manual_seed(seed)

    def loss_at(module: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (64,), generator=generator)
        clean = images[rows].float() / 255
        # generated pictures are never as clean as renders: train on noise of a random strength
        strength = 0.1 * torch.rand(len(rows), 1, 1, 1, generator=generator)
        noisy = clean + strength * torch.randn(clean.shape, generator=generator)
        colours, shapes = split_logits(module(noisy.clamp(0, 1)))
        target = wanted[rows].flatten(0, 1)
        return F.cross_entropy(colours.flatten(0, 1), target[:, 0]) + F.cross_entropy(
            shapes.flatten(0, 1), target[:, 1]
        )

    judge = fit("judge", Judge(), loss_at, steps=steps, learning_rate=2e-3, seed=seed, work=work)
    assert isinstance(judge, Judge)
    test_images, test_captions = base.pictures(work / "judge-test.npz", TEST_PICTURES, wrong_colours=0.0, seed=seed + 2)
    return judge, accuracy(judge, test_images, test_captions)


@torch.no_grad()
def accuracy(judge: Judge, images: Tensor, captions: list[str]) -> float:
    """Share of uint8 pictures (n, 3, 64, 64) of which every colour and shape is named right."""
    wanted = torch.stack([labels(caption) for caption in captions])
    seen = [
        torch.stack([part.argmax(-1) for part in split_logits(judge(b.float() / 255))], -1) for b in images.split(256)
    ]
    return float((torch.cat(seen) == wanted).flatten(1).all(1).float().mean())
