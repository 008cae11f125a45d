"""The rewards on CLIP: each score by hand, its gradient, its range, and what is refused."""

import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scale.rewards import load_scorer
from scale.rewards.clip import Clip
from scale.rewards.clipscore import ClipScore
from scale.rewards.hpsv2 import HPSv2
from scale.rewards.laion_aesthetic import HEADS, LaionAesthetic, affine
from scale.rewards.pickscore import PickScore
from scale.rewards.protocol import Scorer
from tests.scale.rewards import tiny_clip
from tests.scale.rewards.pictures import copies
from tests.scale.rewards.tiny_clip import PROMPTS, SHARED, pictures

NAMES = ["clipscore", "pickscore", "laion-aesthetic", "hpsv2"]
MLP = HEADS[1]


def head(seed: int = 0) -> nn.Sequential:
    """The predictor as its author wrote it, drop-outs and all."""
    torch.manual_seed(seed)
    parts = (SHARED, 1024), 0.2, (1024, 128), 0.2, (128, 64), 0.1, (64, 16), (16, 1)
    return nn.Sequential(*(nn.Linear(*part) if isinstance(part, tuple) else nn.Dropout(part) for part in parts)).eval()


def save_head(folder: Path, table: dict[str, Tensor] | None = None) -> Path:
    given = head().state_dict() if table is None else table
    torch.save({f"layers.{key}": value for key, value in given.items()}, folder / MLP)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that serves all four."""
    return save_head(tiny_clip.write(tmp_path_factory.mktemp("clip")))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test may reach the hub, nor see what this machine has of it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "no cache"))


def by_hand(clip: Clip, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Unit image embeddings and cosines, from a model that the library builds and one prompt at a time."""
    seen, read = tiny_clip.features(clip.tokenizer, clip.preprocess(images), prompts)
    return seen / seen.norm(dim=1, keepdim=True), nn.functional.cosine_similarity(seen, read)


def test_clipscore(folder: Path) -> None:
    """2.5 max(cos, 0) of the caption behind the paper's prefix: clipped and unclipped cases both occur."""
    scorer = ClipScore(folder)
    images, prompts = pictures(12), PROMPTS * 4
    cosines = by_hand(scorer.clip, images, [f"A photo depicts {prompt}" for prompt in prompts])[1]
    scores = scorer.score(images, prompts)
    torch.testing.assert_close(scores, 2.5 * cosines.clamp(min=0), atol=1e-5, rtol=1e-4)
    assert 0 < (scores == 0).sum() < 12
    bare = by_hand(scorer.clip, images, prompts)[1]
    torch.testing.assert_close(
        ClipScore(folder, prefix="", weight=1.0).score(images, prompts), bare.clamp(min=0), atol=1e-5, rtol=1e-4
    )
    assert not torch.allclose(bare, cosines, atol=1e-3)  # the prefix is read


def test_clipping_stops_clipscores_gradient(folder: Path) -> None:
    """Where the cosine is negative the gradient is exactly 0, elsewhere it is not."""
    images = pictures(12).requires_grad_()
    scores = ClipScore(folder).score(images, PROMPTS * 4)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert torch.equal(gradient.abs().sum((1, 2, 3)) == 0, scores == 0)


def test_pickscore(folder: Path) -> None:
    """100 cos - 19 where the temperature is 100; raw without the shift."""
    scorer = PickScore(folder)
    cosines = by_hand(scorer.clip, pictures(), PROMPTS)[1]
    torch.testing.assert_close(scorer.score(pictures(), PROMPTS), 100 * cosines - 19, atol=2e-3, rtol=1e-4)
    raw = PickScore(folder, shift=0.0).score(pictures(), PROMPTS)
    torch.testing.assert_close(raw, 100 * cosines, atol=2e-3, rtol=1e-4)
    assert scorer.range == pytest.approx((-119, 81), abs=0.01)


def test_laion_aesthetic(folder: Path) -> None:
    """The author's network of the unit embedding, whatever the prompt; the range is reached along its weight."""
    scorer = LaionAesthetic(folder)
    seen = by_hand(scorer.clip, pictures(), PROMPTS)[0]
    with torch.no_grad():
        torch.testing.assert_close(scorer.score(pictures(), PROMPTS), head()(seen).squeeze(1), atol=1e-6, rtol=1e-4)
        direction = scorer.weight / scorer.weight.norm()
        extremes = head()(torch.stack([-direction, direction])).squeeze(1)
    assert tuple(extremes.tolist()) == pytest.approx(scorer.range, rel=1e-4)
    assert torch.equal(scorer.score(pictures(), [""] * 3), scorer.score(pictures(), PROMPTS))


def test_hpsv2_of_transformers_weights(folder: Path) -> None:
    """The cosine, where the folder holds the weights in transformers' format."""
    scorer = HPSv2(folder)
    cosines = by_hand(scorer.clip, pictures(3, 40, 56), PROMPTS)[1]
    torch.testing.assert_close(scorer.score(pictures(3, 40, 56), PROMPTS), cosines, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_its_files_are_all_it_needs(folder: Path, tmp_path: Path, name: str) -> None:
    """A folder of these alone gives the same scores; without any one of those that hold numbers there are none."""
    scorer = load_scorer(name, folder)
    again = load_scorer(name, copies(scorer.files, tmp_path / "all"))
    assert torch.equal(again.score(pictures(), PROMPTS), scorer.score(pictures(), PROMPTS))
    needed = [Path(file) for file in scorer.files if Path(file).name != "tokenizer_config.json"]
    assert len(needed) == 4 + (name == "laion-aesthetic")
    for i, left_out in enumerate(needed):
        fewer = copies([file for file in needed if file != left_out], tmp_path / str(i))
        with pytest.raises(ValueError, match=re.escape(left_out.stem)):
            load_scorer(name, fewer)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_image(folder: Path, name: str) -> None:
    """In float64, the gradient at every image is not 0 and its slope along a random direction is the score's own."""
    scorer = load_scorer(name, folder)
    assert scorer.differentiable
    assert isinstance(scorer, ClipScore | PickScore | LaionAesthetic | HPSv2)
    scorer.clip.model.double()
    if isinstance(scorer, LaionAesthetic):
        scorer.weight, scorer.bias = scorer.weight.double(), scorer.bias.double()
    # inside (0, 1), where the preprocessing clamps nothing
    images = (0.3 + 0.4 * pictures(12, 40, 52)).double().requires_grad_()
    scores = scorer._score(images, PROMPTS * 4)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    clipped = scores == 0 if name == "clipscore" else torch.zeros(12, dtype=torch.bool)
    assert torch.equal(gradient.abs().amax((1, 2, 3)) > 0, ~clipped)
    step = 1e-5 * torch.randn(images.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        slope = (scorer._score(images + step, PROMPTS * 4) - scorer._score(images - step, PROMPTS * 4)) / 2
    torch.testing.assert_close((gradient * step).sum((1, 2, 3)), slope, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_an_images_own(folder: Path, name: str) -> None:
    """Float32 and inside the stated range; alone, in small batches or in another order an image scores the same."""
    scorer = load_scorer(name, folder)
    images, prompts = pictures(6, 30, 44), PROMPTS * 2
    scores = scorer.score(images, prompts)
    assert scores.dtype == torch.float32
    assert bool(((scores >= scorer.range[0]) & (scores <= scorer.range[1])).all())
    assert scores.std() > 1e-4
    scorer.batch_size = 4
    torch.testing.assert_close(scorer.score(images.flip(0), prompts[::-1]).flip(0), scores, atol=2e-4, rtol=1e-4)
    assert scorer.score(images[:0], []).shape == (0,)


DEFAULTS: list[tuple[Callable[..., Scorer], str]] = [
    (ClipScore, "openai/clip-vit-base-patch32"),
    (PickScore, "yuvalkirstain/PickScore_v1"),
    (LaionAesthetic, "openai/clip-vit-large-patch14"),
    (HPSv2, "xswu/HPSv2 HPS_v2.1_compressed.pt"),
]


@pytest.mark.parametrize(("make", "repository"), DEFAULTS)
def test_weights_that_cannot_be_had_are_one_line(make: Callable[..., Scorer], repository: str, tmp_path: Path) -> None:
    """Without the weights - by default, of another id, in an empty folder - one line says what to download."""
    for given in ((), ("somebody/something",), (tmp_path,)):
        with pytest.raises(ValueError, match=re.escape(f"hf download {repository} ")) as caught:
            make(*given)
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith("then pass model=FOLDER")


def test_the_head_may_be_missing(folder: Path, tmp_path: Path) -> None:
    """A folder with CLIP alone is told of the head; safetensors do as well."""
    shutil.copytree(folder, tmp_path / "clip")
    (tmp_path / "clip" / MLP).unlink()
    with pytest.raises(ValueError, match=r"lacks sac.*hf download trl-lib/ddpo-aesthetic-predictor"):
        LaionAesthetic(tmp_path / "clip")
    save_file({f"layers.{key}": value for key, value in head().state_dict().items()}, tmp_path / "clip" / HEADS[0])
    expected = LaionAesthetic(folder).score(pictures(), PROMPTS)
    assert torch.equal(LaionAesthetic(tmp_path / "clip").score(pictures(), PROMPTS), expected)


class Malice:
    """A pickle that runs a command, were it opened without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_hostile_head_is_refused(folder: Path, tmp_path: Path) -> None:
    """A head that is a pickle with code is refused, and its code does not run."""
    shutil.copytree(folder, tmp_path / "clip")
    (tmp_path / "clip" / MLP).write_bytes(pickle.dumps(Malice(tmp_path / "ran"), protocol=2))
    with pytest.raises(ValueError, match="refused"):
        LaionAesthetic(tmp_path / "clip")
    assert not (tmp_path / "ran").exists()


def test_a_head_of_another_kind_is_refused() -> None:
    """Layers that are lacking, or of a width that does not follow, are ValueErrors."""
    layers = {f"layers.{key}": value for key, value in head().state_dict().items()}
    with pytest.raises(ValueError, match="of width 25 to a score"):
        affine(layers, 25)
    with pytest.raises(ValueError, match="of width 24 to a score"):
        affine(layers | {"layers.7.weight": torch.ones(2, 16), "layers.7.bias": torch.ones(2)}, SHARED)
    del layers["layers.4.bias"]
    with pytest.raises(ValueError, match="received 9"):
        affine(layers, SHARED)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_the_weight_of_clipscore_is_positive(weight: float) -> None:
    """Another weight is refused before any file is opened."""
    with pytest.raises(ValueError, match="must be positive"):
        ClipScore(weight=weight)


def test_the_temperature_is_the_models_own(tmp_path: Path) -> None:
    """PickScore's temperature is exp(logit_scale) of the weights, not 100 by fiat."""
    folder = tiny_clip.write(tmp_path)
    table = tiny_clip.model().state_dict() | {"logit_scale": torch.tensor(0.0)}
    save_file(table, folder / "model.safetensors")
    scorer = PickScore(folder)
    cosines = by_hand(scorer.clip, pictures(), PROMPTS)[1]
    torch.testing.assert_close(scorer.score(pictures(), PROMPTS), cosines - 19, atol=2e-5, rtol=1e-5)
