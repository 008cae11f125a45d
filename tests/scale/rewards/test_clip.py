"""CLIP's files, preprocessing and embeddings: against the library's own, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from scale.rewards.clip import Clip, Preprocessing, find, load_clip, resize_and_crop, resize_and_pad
from tests.scale.rewards import tiny_clip
from tests.scale.rewards.tiny_clip import DEVIATION, MEAN, PROMPTS, pictures

SHAPES = [(512, 512), (300, 500), (601, 333), (224, 224), (224, 300), (100, 140), (64, 64), (225, 1025)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip.write(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return load_clip(folder)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test may reach the hub, nor see what this machine has of it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "no cache"))


def library(images: Tensor, size: int) -> Tensor:
    """The library's processor (Pillow) on 8-bit images."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    arrays = [(255 * image).round().byte().permute(1, 2, 0).numpy() for image in images]
    return torch.stack([torch.as_tensor(np.array(processor(array)["pixel_values"][0])) for array in arrays])


@pytest.mark.parametrize("shape", SHAPES)
def test_preprocessing_is_the_librarys(shape: tuple[int, int]) -> None:
    """Square, wide, tall, small: the mean difference from the library's 8 bits is below 0.005 of a deviation."""
    images = pictures(2, *shape)
    ours = Preprocessing(224, tuple(MEAN), tuple(DEVIATION))(images)
    theirs = library(images, 224)
    assert ours.shape == theirs.shape == (2, 3, 224, 224)
    assert (ours - theirs).abs().mean() < 0.005


@pytest.mark.parametrize("change", ["shift", "bilinear", "aliased", "mean"])
def test_the_comparison_sees_another_preprocessing(change: str) -> None:
    """Negative control: a crop one pixel off, another filter or another mean exceeds the bound."""
    images = pictures(2, 600, 400)
    ours = Preprocessing(224, tuple(MEAN), tuple(DEVIATION))(images)
    if change == "shift":
        ours = ours.roll(1, -1)
    elif change == "mean":
        ours = ours + 0.01
    else:
        resized = torch.nn.functional.interpolate(
            images, (336, 224), mode="bilinear" if change == "bilinear" else "bicubic", antialias=change == "bilinear"
        )
        mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, DEVIATION))
        ours = (resized[:, :, 56:280].clamp(0, 1) - mean) / deviation
    assert (ours - library(images, 224)).abs().mean() > 0.005


@pytest.mark.parametrize("shape", [(300, 500), (601, 333), (64, 64), (40, 100), (224, 96), (7, 900)])
def test_padding_shows_the_whole_image_on_black(shape: tuple[int, int]) -> None:
    """The longer side becomes 224 as Pillow resizes it, centred; the rest is 0, the odd pixel right and below."""
    image = pictures(1, *shape)
    scale = 224 / max(shape)
    height, width = max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))
    array = (255 * image[0]).round().byte().permute(1, 2, 0).numpy()
    resized = np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)) / 255
    expected = np.zeros((224, 224, 3))
    top, left = (224 - height) // 2, (224 - width) // 2
    expected[top : top + height, left : left + width] = resized
    ours = resize_and_pad(image, 224)[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - expected).mean() < 0.005 * min(DEVIATION)
    assert (ours[:top] == 0).all()
    assert (ours[top + height :] == 0).all()
    assert (ours[:, :left] == 0).all()
    assert (ours[:, left + width :] == 0).all()


def test_a_square_image_is_fitted_alike(clip: Clip) -> None:
    """Cropping and padding agree on a square image, and leave one of the right size as it is."""
    image = pictures(1, 224, 224)
    assert torch.equal(resize_and_crop(image, 224), image)
    assert torch.equal(resize_and_pad(image, 224), image)
    torch.testing.assert_close(resize_and_pad(image, 32).clamp(0, 1), resize_and_crop(image, 32))


def test_embeddings_are_the_librarys(clip: Clip) -> None:
    """Embeddings have length 1 and are what the library's own loading and call give, normalised."""
    seen, read = tiny_clip.features(clip.tokenizer, clip.preprocess(pictures()), PROMPTS)
    for ours, theirs in ((clip.images(pictures()), seen), (clip.prompts(PROMPTS), read)):
        torch.testing.assert_close(ours.norm(dim=-1), torch.ones(3))
        torch.testing.assert_close(ours, theirs / theirs.norm(dim=-1, keepdim=True))
    assert clip.images(pictures()).std(0).max() > 0.02  # the pictures differ


def test_prompts_are_cut_at_the_models_length(clip: Clip) -> None:
    """Beyond the model's tokens nothing is read; within them, the last word is. Repeated prompts keep their places."""
    long = "a " * 13
    first, second, third = clip.prompts([long + "a red", long + "a blue", long + "red"])
    assert torch.equal(first, second)
    assert not torch.allclose(first, third)
    a, b, c = clip.prompts([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert torch.equal(a, c)
    assert not torch.allclose(a, b)


def test_half_and_old_files_load_as_float32(tmp_path: Path, clip: Clip) -> None:
    """Weights stored in half precision, in a pickle with position buffers and old sizes, give float32 embeddings."""
    old = load_clip(tiny_clip.write(tmp_path, half=True, old=True))
    assert {parameter.dtype for parameter in old.model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in old.model.parameters())
    assert not old.model.training
    assert (old.images(pictures()) - clip.images(pictures())).abs().max() < 5e-3


def test_the_end_of_text_may_be_named(tmp_path: Path, clip: Clip) -> None:
    """A configuration that names the end of text by its id, as newer files do, reads prompts alike."""
    tiny_clip.write(tmp_path)
    end = clip.tokenizer.eos_token_id
    edit("config.json", lambda settings: settings["text_config"].update(eos_token_id=end))(tmp_path)
    assert torch.equal(load_clip(tmp_path).prompts(PROMPTS), clip.prompts(PROMPTS))


def edit(name: str, change: Callable[[dict], object]) -> Callable[[Path], object]:
    """A change of a folder's JSON file."""

    def apply(folder: Path) -> None:
        settings = json.loads((folder / name).read_text())
        change(settings)
        (folder / name).write_text(json.dumps(settings))

    return apply


def drop_weight(folder: Path) -> None:
    table = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in table.items() if k != "visual_projection.weight"}, folder / "model.safetensors")


def add_weight(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors") | {"extra": torch.ones(2)}, folder / "model.safetensors")


def hostile(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


PREPROCESSOR = "preprocessor_config.json"
BROKEN = {
    "missing weights": (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
    "missing tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "lacks tokenizer.json"),
    "missing settings": (lambda f: (f / PREPROCESSOR).unlink(), "lacks preprocessor_config.json"),
    "missing config": (lambda f: (f / "config.json").unlink(), "lacks config.json"),
    "no JSON": (lambda f: (f / PREPROCESSOR).write_text("{"), "no JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "other size": (edit(PREPROCESSOR, lambda s: s.update(size={"shortest_edge": 30})), "images of size"),
    "other crop": (edit(PREPROCESSOR, lambda s: s.update(crop_size=30)), "cut to 30"),
    "bilinear": (edit(PREPROCESSOR, lambda s: s.update(resample=2)), "not CLIP's preprocessing"),
    "no crop": (edit(PREPROCESSOR, lambda s: s.update(do_center_crop=False)), "not CLIP's preprocessing"),
    "two means": (edit(PREPROCESSOR, lambda s: s.update(image_mean=[0.5, 0.5])), "three numbers each"),
    "no deviation": (edit(PREPROCESSOR, lambda s: s.update(image_std=[0.2, 0.0, 0.2])), "must be positive"),
    "infinite": (edit(PREPROCESSOR, lambda s: s.update(image_mean=[float("inf")] * 3)), "three numbers each"),
    "wider": (edit("config.json", lambda s: s["text_config"].update(hidden_size=48)), "do not fit config.json"),
    "heads": (edit("config.json", lambda s: s["text_config"].update(num_attention_heads=5)), "configuration"),
    "endless": (edit("config.json", lambda s: s["vision_config"].update(num_hidden_layers=10**9)), "more layers"),
    "fewer words": (edit("config.json", lambda s: s["text_config"].update(vocab_size=99)), "tokens"),
    "other end": (edit("config.json", lambda s: s["text_config"].update(eos_token_id=577)), "ends its prompts"),
    "lost weight": (drop_weight, "lack visual_projection.weight"),
    "one too many": (add_weight, "too many: extra"),
    "hostile pickle": (hostile, "refused"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"a": 1}'), "no CLIP's tokenizer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused(tmp_path: Path, case: str) -> None:
    """Each broken file is a ValueError that says what is wrong with it."""
    break_it, message = BROKEN[case]
    break_it(tiny_clip.write(tmp_path))
    with pytest.raises(ValueError, match=message):
        load_clip(tmp_path)


def test_other_places_lend_all_but_the_weights(tmp_path: Path, folder: Path, clip: Clip) -> None:
    """A folder with weights alone borrows the rest; a folder without weights never borrows them."""
    weights, rest = tmp_path / "weights", tmp_path / "rest"
    weights.mkdir()
    rest.mkdir()
    (weights / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert torch.equal(load_clip(weights, str(folder)).images(pictures()), clip.images(pictures()))
    with pytest.raises(ValueError, match=r"lacks model.safetensors"):
        load_clip(tiny_clip.write_settings(rest), str(folder))


def test_the_cache_of_the_hub_is_enough(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in the hub's cache opens by its id, offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "abc").symlink_to(folder, target_is_directory=True)
    assert find(("none", "config.json"), "somebody/clip").read_bytes() == (folder / "config.json").read_bytes()
    assert load_clip("somebody/clip").length == tiny_clip.LENGTH


@pytest.mark.parametrize("model", ["somebody/clip", "no such folder", "/nowhere/at/all", "~/nowhere"])
def test_no_such_model_is_one_line(model: str) -> None:
    """An id that cannot be fetched, or a path to nothing, is a ValueError of one line that names it."""
    with pytest.raises(ValueError, match=r"no folder .*, and the hub gives no") as caught:
        load_clip(model)
    assert "\n" not in str(caught.value)
    assert model in str(caught.value)
