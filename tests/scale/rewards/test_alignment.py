"""Alignment: it counts what a judge sees, and says what it cannot judge."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from scale.mini import world
from scale.rewards.alignment import COLOURS, SHAPES, Alignment, Judge, labels
from tests.scale.rewards.pictures import PROMPTS, blocks, random_judge


@pytest.fixture(scope="module")
def alignment(tmp_path_factory: pytest.TempPathFactory) -> Alignment:
    return random_judge(tmp_path_factory.mktemp("judge"))


class Oracle(Judge):
    """A judge that is sure to see a red circle and a blue square in every picture."""

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.full((2, len(COLOURS) + len(SHAPES)), -50.0)
        for slot, (colour, shape) in enumerate(labels("a red circle and a blue square").tolist()):
            logits[slot, colour] = logits[slot, len(COLOURS) + shape] = 50.0
        return logits.to(images.device).expand(len(images), -1, -1)


@pytest.mark.parametrize(
    ("prompt", "score"),
    [
        ("a red circle and a blue square", 2.0),
        ("a red circle and a blue star", 1.0),
        ("a red circle and a green star", 0.0),
        ("a red colored circle", 0.0),
        ("a white ring and a green star", -2.0),
        ("a blue square and a red circle", -2.0),
    ],
)
def test_alignment_counts_what_the_judge_sees(
    alignment: Alignment, monkeypatch: pytest.MonkeyPatch, prompt: str, score: float
) -> None:
    """A sure judge gives one point for each right colour or shape, an object too many counts as wrong, sides matter."""
    monkeypatch.setattr(alignment, "judge", Oracle())
    torch.testing.assert_close(alignment.score(blocks(1), [prompt]), torch.tensor([score]))


def test_alignment_is_the_mean_probability_by_hand(alignment: Alignment) -> None:
    """Four softmax entries of the judge's own logits, picked one by one: the score is 4 times their mean, minus 2."""
    (logits,) = alignment.judge(blocks(1)).double()
    right = [
        float(part.exp()[word] / part.exp().sum())
        for slot, (colour, shape) in zip(logits, labels(PROMPTS[1]).tolist(), strict=True)
        for part, word in ((slot[: len(COLOURS)], colour), (slot[len(COLOURS) :], shape))
    ]
    assert len(right) == 4
    assert float(alignment.score(blocks(1), PROMPTS[1:2])) == pytest.approx(sum(right) - 2, abs=1e-5)


def test_alignment_refuses_other_worlds(alignment: Alignment) -> None:
    """It cannot judge what it has no words for, and says so."""
    with pytest.raises(ValueError, match="not a caption of the small world"):
        alignment.score(blocks(1), ["an astronaut on a horse"])


def test_alignment_takes_other_sizes(alignment: Alignment) -> None:
    """Pictures of other models are resized; a picture of blocks scores about alike at twice the size."""
    twice = blocks().repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(alignment.score(twice, PROMPTS), alignment.score(blocks(), PROMPTS), rtol=0, atol=0.02)


def test_alignment_without_a_judge(tmp_path: Path) -> None:
    """No judge is a ValueError that says how to make one."""
    with pytest.raises(ValueError, match=r"scale\.mini\.build"):
        Alignment(tmp_path)


@pytest.mark.parametrize("content", [b"no tensors", save({"weight": torch.zeros(2)})], ids=["garbage", "others"])
def test_alignment_with_another_s_file(tmp_path: Path, content: bytes) -> None:
    """A file that is no judge is a ValueError that names it."""
    (tmp_path / "judge.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"judge\.safetensors"):
        Alignment(tmp_path)


def test_the_judge_s_shape_is_the_world_s() -> None:
    """It reads the world's pictures and names the world's words, or nothing, in two slots."""
    logits = Judge()(torch.zeros(2, 3, world.SIZE, world.SIZE))
    assert logits.shape == (2, 2, len(world.COLOURS) + 1 + len(world.SHAPES) + 1)
