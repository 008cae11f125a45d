"""What `Scorer.score` does for every scorer: batches, and a check of what goes in and what comes out."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import scale.rewards.protocol
from scale.rewards import Scorer
from scale.rewards.protocol import check_images
from tests.scale.rewards.pictures import blocks


class Recorder(Scorer):
    """Scores by a function of the images, and keeps what it was asked."""

    name = "recorder"

    def __init__(self, answer: Callable[[Tensor], Tensor], batch_size: int = 64) -> None:
        self.answer, self.batch_size = answer, batch_size
        self.asked: list[tuple[Tensor, list[str]]] = []

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.asked.append((images, list(prompts)))
        return self.answer(images)


def brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 8, 64])
def test_a_scorer_sees_at_most_a_batch(batch_size: int) -> None:
    """Seven images come in order, each once beside its own prompt, at most `batch_size` at a time: the same scores."""
    images, prompts = blocks(7), [f"prompt {i}" for i in range(7)]
    recorder = Recorder(brightness, batch_size)
    assert torch.equal(recorder.score(images, prompts), brightness(images))
    assert [len(batch) for batch, _ in recorder.asked][:-1] == [batch_size] * ((7 - 1) // batch_size)
    assert torch.equal(torch.cat([batch for batch, _ in recorder.asked]), images)
    assert [prompt for _, batch in recorder.asked for prompt in batch] == prompts


def test_no_images_ask_nobody() -> None:
    """No images have no scores, and the scorer is left alone."""
    recorder = Recorder(brightness)
    assert recorder.score(blocks(1)[:0], []).shape == (0,)
    assert not recorder.asked


def test_gradients_pass_through_batches() -> None:
    """The gradient of seven scores in batches of three is that of the function itself."""
    images = blocks(7).requires_grad_()
    Recorder(lambda x: (x**2).mean((1, 2, 3)), 3).score(images, [""] * 7).sum().backward()
    assert images.grad is not None
    torch.testing.assert_close(images.grad, 2 * images.detach() / images[0].numel())


def test_a_double_answer_to_double_images_is_float32() -> None:
    """A scorer gets float32 and its answer becomes float32, whatever came."""
    recorder = Recorder(lambda x: brightness(x).double())
    assert recorder.score(blocks(2).double(), ["", ""]).dtype == torch.float32
    assert recorder.asked[0][0].dtype == torch.float32


WRONG_ANSWERS = {
    "one number": (lambda x: x.mean(), r"received shape \(\) for 2 images"),
    "a column": (lambda x: brightness(x)[:, None], r"shape \(2, 1\) for 2"),
    "one too few": (lambda x: brightness(x)[1:], r"shape \(1,\) for 2"),
    "NaN": (lambda x: brightness(x) * torch.tensor([1, torch.nan]), "1 of 2 images, the first of the prompt 'second'"),
    "infinite": (lambda x: brightness(x) / 0, "2 of 2 images, the first of the prompt 'first'"),
    "beyond float32": (lambda x: brightness(x).double() * 1e300, "infinity to 2 of 2"),
}


@pytest.mark.parametrize("case", WRONG_ANSWERS)
def test_wrong_answers_are_refused(case: str) -> None:
    """What is not one finite number an image is a ValueError that names the reward, what came, and for which prompt."""
    answer, reason = WRONG_ANSWERS[case]
    with pytest.raises(ValueError, match=f"the reward recorder .*{reason}"):
        Recorder(answer).score(blocks(2), ["first", "second"])


@pytest.mark.parametrize("batch_size", [0, -1])
def test_an_empty_batch_is_refused(batch_size: int) -> None:
    """Batches of no images would never end, or score nothing."""
    with pytest.raises(
        ValueError, match=f"batch_size of the reward recorder must be at least 1, received {batch_size}"
    ):
        Recorder(brightness, batch_size).score(blocks(2), ["", ""])


@pytest.mark.parametrize("runs_on", ["accelerator", "anywhere"])
def test_where_images_are_scored(monkeypatch: pytest.MonkeyPatch, runs_on: str) -> None:
    """With an accelerator (here the device that holds no numbers) images move there, and stay where that is asked."""
    monkeypatch.setattr(scale.rewards.protocol, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(Recorder, "runs_on", runs_on)
    recorder = Recorder(lambda x: torch.ones(len(x)))
    scores = recorder.score(blocks(2), ["", ""])
    assert recorder.asked[0][0].device.type == ("meta" if runs_on == "accelerator" else "cpu")
    assert scores.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_scores_come_back_to_where_the_images_are() -> None:
    """Images of the CPU are scored on the GPU, and images of either device have their scores, and gradients, there."""
    for place in ("cpu", "cuda"):
        images = blocks(3).to(place).requires_grad_()
        recorder = Recorder(brightness, 2)
        scores = recorder.score(images, [""] * 3)
        scores.sum().backward()
        assert recorder.asked[0][0].device.type == "cuda"
        assert images.grad is not None
        assert {scores.device.type, images.grad.device.type} == {place}


WRONG_IMAGES = {
    "no batch": (torch.zeros(3, 8, 8), 3, "images"),
    "grey": (torch.zeros(2, 1, 8, 8), 2, "images"),
    "channels last": (torch.zeros(2, 8, 8, 3), 2, "images"),
    "no pixel": (torch.zeros(2, 3, 0, 8), 2, "images"),
    "fewer prompts": (torch.zeros(2, 3, 8, 8), 1, r"received \(2, 3, 8, 8\) and 1"),
    "more prompts": (torch.zeros(2, 3, 8, 8), 3, "and 3"),
    "bytes": (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 1, r"received torch\.uint8; divide by 255"),
    "to 255": (torch.full((1, 3, 8, 8), 255.0), 1, r"\[0, 1\], received values from 255"),
    "latents": (torch.full((1, 3, 8, 8), -1.0), 1, r"\[0, 1\]"),
    "NaN": (torch.full((1, 3, 8, 8), torch.nan), 1, r"\[0, 1\]"),
}


@pytest.mark.parametrize("case", WRONG_IMAGES)
def test_wrong_images_are_refused(case: str) -> None:
    """What is no batch of images in [0, 1] is a ValueError that says what came."""
    batch, prompts, reason = WRONG_IMAGES[case]
    with pytest.raises(ValueError, match=reason):
        check_images(batch, [""] * prompts)
