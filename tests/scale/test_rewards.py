"""The scorers: against independent implementations, in range, and refusing what is no image."""

from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_model
from torch import Tensor

from scale.mini import world
from scale.rewards import SCORERS, Scorer, load_scorer
from scale.rewards.alignment import Alignment, Judge
from scale.rewards.colorfulness import Colorfulness
from scale.rewards.jpeg import QUALITY, Jpeg
from scale.rewards.protocol import check_images

PROMPTS = ["a red colored circle", "a red circle and a blue square", "an orange ring and a white star"]


def images(n: int = 3, size: int = 64, seed: int = 0) -> Tensor:
    """Random blocks of colour (n, 3, size, size)."""
    small = torch.rand(n, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(seed))
    return small.repeat_interleave(8, 2).repeat_interleave(8, 3)


@pytest.fixture(scope="module")
def alignment(tmp_path_factory: pytest.TempPathFactory) -> Alignment:
    """The scorer with a judge of random weights, stored in half precision as the shipped one is."""
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    save_model(Judge().half(), str(folder / "judge.safetensors"))
    return Alignment(folder)


@pytest.fixture(params=["colorfulness", "jpeg", "alignment"])
def scorer(request: pytest.FixtureRequest, alignment: Alignment) -> Scorer:
    return alignment if request.param == "alignment" else load_scorer(request.param)


def test_the_scorers_have_the_protocol(scorer: Scorer) -> None:
    """Each scorer says its name, its range, and whether gradients reach the pixels; the registry knows it."""
    assert isinstance(scorer, Scorer)
    assert scorer.name in SCORERS
    assert scorer.range[0] < scorer.range[1]


def test_scores_are_one_float32_an_image_in_range(scorer: Scorer) -> None:
    """One finite float32 an image, inside the range that the scorer states."""
    scores = scorer.score(images(), PROMPTS)
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    low, high = scorer.range
    assert bool(((scores >= low) & (scores <= high)).all())


def test_scores_do_not_depend_on_batch_or_order(scorer: Scorer) -> None:
    """An image's score is its own: alone, or among others in another order."""
    batch = images()
    together = scorer.score(batch, PROMPTS)
    backwards = scorer.score(batch.flip(0), PROMPTS[::-1]).flip(0)
    alone = torch.cat([scorer.score(batch[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(backwards, together, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_pixels_where_the_scorer_says_so(scorer: Scorer) -> None:
    """`differentiable` is true exactly where a gradient comes back to every image."""
    pixels = images().requires_grad_()
    scores = scorer.score(pixels, PROMPTS)
    assert scores.requires_grad == scorer.differentiable
    if scorer.differentiable:
        scores.sum().backward()
        assert pixels.grad is not None
        assert bool(pixels.grad.isfinite().all())
        assert bool((pixels.grad.flatten(1).abs().amax(1) > 0).all())


def hasler_suesstrunk(picture: np.ndarray) -> float:
    """M3 of the paper, sec. 6, written from its text: picture (H, W, 3) in 0..255."""
    r, g, b = (picture[..., i].astype(np.float64).ravel() for i in range(3))
    rg, yb = r - g, 0.5 * (r + g) - b
    sigma = np.sqrt(np.std(rg) ** 2 + np.std(yb) ** 2)
    mu = np.sqrt(np.mean(rg) ** 2 + np.mean(yb) ** 2)
    return sigma + 0.3 * mu


def test_colorfulness_against_the_paper() -> None:
    """The score is the paper's M3 by hundred, computed here by numpy from the paper's text."""
    batch = images(5, seed=3)
    expected = [hasler_suesstrunk(255 * image.permute(1, 2, 0).numpy()) / 100 for image in batch]
    torch.testing.assert_close(Colorfulness().score(batch, [""] * 5), torch.tensor(expected).float())


def test_colorfulness_of_known_pictures() -> None:
    """Greys have none; one flat colour has the shift alone; red beside cyan has spread too (by hand)."""
    grey = torch.linspace(0, 1, 16).expand(3, 16, 16)
    red = torch.zeros(3, 16, 16)
    red[0] = 1
    halves = torch.cat([red[..., :8], 1 - red[..., 8:]], -1)
    scores = Colorfulness().score(torch.stack([grey, red, halves]), [""] * 3)
    flat = 0.3 * 255 * 1.25**0.5 / 100  # rg = 255, yb = 127.5
    mixed = 255 * 1.25**0.5 / 100  # rg = +-255, yb = +-127.5: spread alone, no shift
    torch.testing.assert_close(scores, torch.tensor([0.0, flat, mixed]), rtol=1e-5, atol=1e-5)


def test_a_grey_image_has_a_finite_gradient() -> None:
    """The root has no derivative at zero: without care one grey image would turn all training into NaN."""
    grey = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
    Colorfulness().score(grey, [""]).sum().backward()
    assert grey.grad is not None
    assert bool(grey.grad.isfinite().all())


def test_jpeg_against_files_on_disk(tmp_path: Path) -> None:
    """The score is minus the kilobytes of the file that Pillow writes at quality 95."""
    batch = images()
    for i, image in enumerate(batch):
        pixels = (255 * image).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg", quality=95)
    expected = [-(tmp_path / f"{i}.jpg").stat().st_size / 1000 for i in range(3)]
    assert QUALITY == 95
    torch.testing.assert_close(Jpeg().score(batch, PROMPTS), torch.tensor(expected))


def test_jpeg_prefers_simple_pictures() -> None:
    """A flat picture compresses better than blocks, and blocks better than noise."""
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    flat, blocks, noisy = Jpeg().score(torch.cat([torch.full_like(noise, 0.3), images(1), noise]), [""] * 3).tolist()
    assert noisy < blocks < flat < 0


def test_ranges() -> None:
    """The stated ranges are the definitions' own."""
    assert Colorfulness.range == (0.0, inf)
    assert Jpeg.range == (-inf, 0.0)
    assert Alignment.range == (-2.0, 2.0)


class Oracle(torch.nn.Module):
    """A judge that is sure to see a red circle and a blue square in every picture."""

    def forward(self, pictures: Tensor) -> Tensor:
        from scale.rewards.alignment import COLOURS, SHAPES, labels

        logits = torch.full((2, len(COLOURS) + len(SHAPES)), -50.0)
        for slot, (colour, shape) in enumerate(labels("a red circle and a blue square").tolist()):
            logits[slot, colour] = logits[slot, len(COLOURS) + shape] = 50.0
        return logits.expand(len(pictures), -1, -1)


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
def test_alignment_counts_what_the_judge_sees(alignment: Alignment, prompt: str, score: float) -> None:
    """A sure judge gives one point for each right colour or shape, an object too many counts as wrong, sides matter."""
    sure = Alignment.__new__(Alignment)
    sure.judge = Oracle()  # pyright: ignore
    torch.testing.assert_close(sure.score(images(1), [prompt]), torch.tensor([score]))


def test_alignment_refuses_other_worlds(alignment: Alignment) -> None:
    """It cannot judge what it has no words for, and says so."""
    with pytest.raises(ValueError, match="not a caption of the small world"):
        alignment.score(images(1), ["an astronaut on a horse"])


def test_alignment_takes_other_sizes(alignment: Alignment) -> None:
    """Pictures of other models are resized; a picture of blocks scores about alike at twice the size."""
    twice = images().repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(alignment.score(twice, PROMPTS), alignment.score(images(), PROMPTS), rtol=0, atol=0.02)


def test_alignment_without_a_judge(tmp_path: Path) -> None:
    """No judge is a ValueError that says how to make one."""
    with pytest.raises(ValueError, match=r"scale\.mini\.build"):
        Alignment(tmp_path)


def test_the_judge_s_shape_is_the_world_s() -> None:
    """It reads the world's pictures and names the world's words, or nothing, in two slots."""
    logits = Judge()(torch.zeros(2, 3, world.SIZE, world.SIZE))
    assert logits.shape == (2, 2, len(world.COLOURS) + 1 + len(world.SHAPES) + 1)


WRONG_IMAGES = {
    "no batch": (torch.zeros(3, 8, 8), 3, "images"),
    "grey": (torch.zeros(2, 1, 8, 8), 2, "images"),
    "channels last": (torch.zeros(2, 8, 8, 3), 2, "images"),
    "fewer prompts": (torch.zeros(2, 3, 8, 8), 1, r"received \(2, 3, 8, 8\) and 1"),
    "more prompts": (torch.zeros(2, 3, 8, 8), 3, "and 3"),
    "bytes": (torch.full((1, 3, 8, 8), 255.0), 1, r"\[0, 1\], received values from 255"),
    "latents": (torch.full((1, 3, 8, 8), -1.0), 1, r"\[0, 1\]"),
    "NaN": (torch.full((1, 3, 8, 8), torch.nan), 1, r"\[0, 1\]"),
}


@pytest.mark.parametrize("case", WRONG_IMAGES)
def test_wrong_images_are_refused(case: str) -> None:
    """What is no batch of images in [0, 1] is a ValueError that says what came."""
    batch, prompts, reason = WRONG_IMAGES[case]
    with pytest.raises(ValueError, match=reason):
        check_images(batch, [""] * prompts)


def test_scorers_check_their_images(scorer: Scorer) -> None:
    """Every scorer refuses NaN: a NaN score would be recorded as if it were one."""
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        scorer.score(torch.full((1, 3, 64, 64), torch.nan), PROMPTS[:1])


def test_an_unknown_reward_is_refused() -> None:
    """`load_scorer` names the rewards that there are."""
    with pytest.raises(ValueError, match="no reward 'beauty'; the rewards are alignment, colorfulness, jpeg"):
        load_scorer("beauty")
