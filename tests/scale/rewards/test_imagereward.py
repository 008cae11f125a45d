"""ImageReward: against a plain forward pass of the original's layout, Pillow's preprocessing, and hostile files."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from scale.rewards.blip import DEVIATION, MEAN, load_encoder, preprocess
from scale.rewards.imagereward import LENGTH, ImageReward, load_head
from tests.scale.rewards import tiny_blip
from tests.scale.rewards.pictures import copies

PROMPTS = ["a red circle", "A blue square and red circles, and a", "unknown words"]
IDS = [[2, 5, 6, 8, 3], [2, 5, 7, 10, 11, 6, 8, 9, 12, 11, 5, 3], [2, 1, 1, 3]]  # by hand, from tiny_blip.WORDS


def images(n: int = 3, height: int = 40, width: int = 24, seed: int = 1) -> Tensor:
    """Smooth random pictures with some grain, (n, 3, height, width) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (smooth + 0.05 * torch.randn(n, 3, height, width, generator=generator)).clamp(0, 1)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return tiny_blip.random_weights()


@pytest.fixture(scope="module")
def folder(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_blip.write(tmp_path_factory.mktemp("imagereward"), weights)


@pytest.fixture(scope="module")
def scorer(folder: Path) -> ImageReward:
    return ImageReward(folder)


def by_hand(weights: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """The plain forward pass, on tokens made by hand."""
    ids = torch.tensor([row + [0] * (LENGTH - len(row)) for row in IDS])
    return tiny_blip.reward(weights, preprocess(pictures, 24), ids, (ids != 0).long())


def test_the_score_is_the_original_layouts(scorer: ImageReward, weights: dict[str, Tensor]) -> None:
    """Scores of the converted model equal a forward pass from the raw weights, to 1e-4 of their size."""
    scores = scorer.score(images(), PROMPTS)
    torch.testing.assert_close(scores, by_hand(weights, images()), rtol=1e-4, atol=1e-5)
    assert scores.std() > 0.05  # the parts of the model do move the score


@pytest.mark.parametrize("name", ["crossattention.self.value.weight", "blocks.1.attn.qkv.bias", "LayerNorm.bias"])
def test_the_comparison_sees_every_part(scorer: ImageReward, weights: dict[str, Tensor], name: str) -> None:
    """Negative control: with one kind of weight shifted in the reference alone, the scores differ."""
    shifted = {key: value + 0.05 * (name in key) for key, value in weights.items()}
    assert not torch.allclose(scorer.score(images(), PROMPTS), by_hand(shifted, images()), rtol=1e-3, atol=1e-4)


def test_its_files_are_all_it_needs(scorer: ImageReward, tmp_path: Path) -> None:
    """A folder of these alone gives the same scores."""
    again = ImageReward(copies(scorer.files, tmp_path / "all"))
    assert torch.equal(again.score(images(), PROMPTS), scorer.score(images(), PROMPTS))


def test_prompts_are_padded_and_cut_at_35(scorer: ImageReward) -> None:
    """Short prompts are padded to 35 tokens; of long ones [CLS], 33 tokens and [SEP] stay, so the tail is unread."""
    long = "a " * 60
    first, second = scorer.score(images(1).expand(2, -1, -1, -1), [long, long + "red"])
    assert first == second
    tokens = scorer.tokenizer([*PROMPTS, long], padding="max_length", truncation=True, max_length=LENGTH)
    assert [len(row) for row in tokens["input_ids"]] == [35] * 4
    assert tokens["input_ids"][3] == [2, *[5] * 33, 3]
    assert [row[: len(ids)] for row, ids in zip(tokens["input_ids"], IDS, strict=False)] == IDS


def test_blips_two_words_come_after_berts(scorer: ImageReward) -> None:
    """[DEC] and [ENC] are the two words after BERT's, as in the checkpoint's 30524 = 30522 + 2 rows."""
    n = len(tiny_blip.WORDS)
    assert scorer.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [n, n + 1]


def test_scores_do_not_depend_on_the_batch(scorer: ImageReward) -> None:
    """Every image has the same score alone, in another order and in a larger batch."""
    together = scorer.score(images(), PROMPTS)
    alone = torch.cat([scorer.score(images()[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    back = scorer.score(images().flip(0), PROMPTS[::-1]).flip(0)
    for other in (alone, back):
        torch.testing.assert_close(other, together, rtol=1e-5, atol=1e-5)


def test_the_prompt_matters(scorer: ImageReward) -> None:
    """One image with three prompts has three scores."""
    assert len(scorer.score(images(1).expand(3, -1, -1, -1), PROMPTS).unique()) == 3


def test_gradients_reach_every_image(folder: Path) -> None:
    """In float64, the gradient along a random direction is the central difference, for each of three images."""
    scorer = ImageReward(folder)
    scorer.encoder.double()
    scorer.head.double()
    pictures = (0.2 + 0.6 * images()).double().to(next(scorer.head.parameters()).device).requires_grad_()
    (gradient,) = torch.autograd.grad(scorer._score(pictures, PROMPTS).sum(), pictures)
    direction = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    direction, step = direction.to(pictures.device), 1e-5
    with torch.no_grad():
        ahead, behind = (scorer._score(pictures + s * step * direction, PROMPTS) for s in (1, -1))
    slope = (ahead - behind) / (2 * step)
    assert bool((slope.abs() > 1e-4).all())
    torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), slope, rtol=1e-6, atol=1e-9)


def test_the_public_score_is_differentiable(scorer: ImageReward) -> None:
    """`score` itself passes gradients to every image, and asks for none of the weights'."""
    pictures = images().requires_grad_()
    scorer.score(pictures, PROMPTS).sum().backward()
    assert pictures.grad is not None
    assert bool((pictures.grad.abs().amax((1, 2, 3)) > 0).all())
    assert not any(p.requires_grad for p in (*scorer.encoder.parameters(), *scorer.head.parameters()))
    assert not scorer.encoder.training
    assert not scorer.head.training


def pillow(picture: Tensor, size: int) -> Tensor:
    """The original's transform, with Pillow and numpy: Resize(bicubic), CenterCrop, ToTensor."""
    pixels = (255 * picture).round().byte().permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    short = min(height, width)
    resized = Image.fromarray(pixels).resize(
        (int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC
    )
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    crop = resized.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255


@pytest.mark.parametrize("shape", [(512, 512), (64, 64), (300, 450), (451, 299), (224, 224), (150, 1000), (224, 227)])
def test_preprocessing_is_pillows(shape: tuple[int, int]) -> None:
    """Within Pillow's 8-bit rounding: mean error below half a grey level of 255, whatever the size."""
    picture = (255 * images(1, *shape)[0]).round() / 255
    mean, deviation = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(DEVIATION).view(3, 1, 1)
    error = (preprocess(picture[None], 224)[0] * deviation + mean - pillow(picture, 224)).abs()
    assert error.mean() < 0.5 / 255
    assert (error / deviation).mean() < 0.005  # in the model's units
    assert error.max() < 0.03


def test_pillows_comparison_can_fail() -> None:
    """Negative control: a crop that is one pixel off breaks the bound that the true one keeps."""
    picture = (255 * images(1, 300, 450)[0]).round() / 255
    mean, deviation = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(DEVIATION).view(3, 1, 1)
    error = (preprocess(picture[None].roll(1, 3), 224)[0] * deviation + mean - pillow(picture, 224)).abs()
    assert error.mean() > 0.5 / 255


def test_the_real_sizes_fit() -> None:
    """All names of a full-size checkpoint (ViT-L/16, BERT-base; shapes only) find their place, with nothing left."""
    table = {name: torch.empty(shape, device="meta") for name, shape in tiny_blip.shapes(tiny_blip.REAL).items()}
    blip = {key.removeprefix("blip."): value for key, value in table.items() if key.startswith("blip.")}
    encoder = load_encoder(blip, tiny_blip.settings(tiny_blip.REAL))
    head = load_head({k.removeprefix("mlp.layers."): v for k, v in table.items() if k.startswith("mlp.")})
    unused = sum(v.numel() for k, v in table.items() if "_proj." in k or k.endswith("position_ids"))
    filled = sum(p.numel() for p in (*encoder.parameters(), *head.parameters()))
    assert filled == sum(v.numel() for v in table.values()) - unused
    assert encoder.size == 224
    assert encoder.vision.config.num_attention_heads == 16


def test_half_precision_and_safetensors_are_read(weights: dict[str, Tensor], folder: Path, tmp_path: Path) -> None:
    """Half-precision weights in safetensors score as the same weights in float32."""
    half = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    shutil.copytree(folder, tmp_path / "half")
    (tmp_path / "half" / "ImageReward.pt").unlink()
    save_file({k: v.contiguous() for k, v in half.items()}, tmp_path / "half" / "ImageReward.safetensors")
    scorer = ImageReward(tmp_path / "half")
    assert {p.dtype for p in scorer.encoder.parameters()} == {torch.float32}
    expected = by_hand({k: v.float() if v.is_floating_point() else v for k, v in half.items()}, images())
    torch.testing.assert_close(scorer.score(images(), PROMPTS), expected, rtol=1e-4, atol=1e-5)


class Bomb:
    """A pickle that would write a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_refused(folder: Path, tmp_path: Path) -> None:
    """A pickle that asks for code is refused, and the code does not run."""
    shutil.copytree(folder, tmp_path / "hostile")
    (tmp_path / "hostile" / "ImageReward.pt").write_bytes(pickle.dumps({"mlp": Bomb(tmp_path / "ran")}))
    with pytest.raises(ValueError, match="refused"):
        ImageReward(tmp_path / "hostile")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["ImageReward.pt", "med_config.json", "vocab.txt"])
def test_a_missing_file_is_named_in_one_line(folder: Path, tmp_path: Path, name: str) -> None:
    """The error names the missing file, where to get it and how to pass it, in one line."""
    shutil.copytree(folder, tmp_path / "part")
    (tmp_path / "part" / name).unlink()
    with pytest.raises(ValueError, match=rf"lacks {name}; .*hf download THUDM/ImageReward .*model=FOLDER$") as caught:
        ImageReward(tmp_path / "part")
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_gives_the_same_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No folder, nothing in the cache and no network: one line with the remedy, no trace of the hub's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for model in ("THUDM/ImageReward", tmp_path / "nowhere", "no such id"):
        with pytest.raises(ValueError, match=r"no folder .*hf download google-bert/bert-base-uncased") as caught:
            ImageReward(model)
        assert "\n" not in str(caught.value)


def damaged(weights: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The weights with something wrong."""
    copy, layer = dict(weights), "blip.text_encoder.encoder.layer"
    if kind == "missing":
        del copy[f"{layer}.1.output.dense.bias"]
    if kind == "surplus":
        copy[f"{layer}.0.adapter.weight"] = torch.zeros(1)
    if kind == "shape":
        copy[f"{layer}.1.output.dense.bias"] = torch.zeros(7)
    if kind == "headless":
        copy = {k: v for k, v in copy.items() if not k.startswith("mlp.")}
    if kind == "other":
        copy = {"unet.weight": torch.zeros(3)}
    return copy


@pytest.mark.parametrize("kind", ["missing", "surplus", "shape", "headless", "other"])
def test_weights_that_do_not_fit_are_refused(folder: Path, tmp_path: Path, weights: dict, kind: str) -> None:
    """Weights that lack a part, have one too many or another shape: ValueError in one line, never a silent default."""
    shutil.copytree(folder, tmp_path / kind)
    torch.save(damaged(weights, kind), tmp_path / kind / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"no ImageReward in .*hf download") as caught:
        ImageReward(tmp_path / kind)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("med_config.json", "{"),
        ("med_config.json", "[]"),
        ("med_config.json", json.dumps(tiny_blip.settings() | {"num_attention_heads": 5})),
        ("med_config.json", json.dumps(tiny_blip.settings() | {"num_attention_heads": 0})),
        ("med_config.json", json.dumps(tiny_blip.settings() | {"num_attention_heads": "four"})),
        ("med_config.json", json.dumps(tiny_blip.settings() | {"hidden_act": "none such"})),
        ("med_config.json", json.dumps({"hidden_size": 48})),
        ("vocab.txt", "one\ntwo\n"),
        ("vocab.txt", "\n".join(f"word{i}" for i in range(len(tiny_blip.WORDS)))),
    ],
)
def test_settings_and_words_that_do_not_fit_are_refused(folder: Path, tmp_path: Path, name: str, content: str) -> None:
    """Settings or words that are broken, or belong to another model: ValueError in one line."""
    shutil.copytree(folder, tmp_path / "odd")
    (tmp_path / "odd" / name).write_text(content)
    with pytest.raises(ValueError, match=r"no ImageReward in .*hf download") as caught:
        ImageReward(tmp_path / "odd")
    assert "\n" not in str(caught.value)
