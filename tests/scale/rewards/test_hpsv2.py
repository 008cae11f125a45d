"""HPSv2's checkpoints: open_clip's weights, converted, against a forward pass of open_clip's own layout."""

import pickle
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from scale.rewards.clip import load_clip
from scale.rewards.hpsv2 import VERSIONS, HPSv2, to_transformers
from tests.scale.rewards import tiny_clip
from tests.scale.rewards.pictures import copies
from tests.scale.rewards.tiny_clip import LENGTH, PROMPTS, OpenClip, pictures

CHECKPOINT = VERSIONS["v2.1"]


@pytest.fixture(scope="module")
def original() -> OpenClip:
    return OpenClip()


@pytest.fixture(scope="module")
def folder(original: OpenClip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `hf download` leaves it: the checkpoint, and CLIP ViT-H's settings beside."""
    folder = tiny_clip.write_settings(tmp_path_factory.mktemp("hpsv2"))
    torch.save({"state_dict": original.state_dict()}, folder / CHECKPOINT)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test may reach the hub, nor see what this machine has of it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "no cache"))


def ids(scorer: HPSv2) -> Tensor:
    """Tokens as open_clip lays them out: zeros behind the end of text."""
    rows = [scorer.clip.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def embeddings(model: OpenClip, scorer: HPSv2, images: Tensor) -> tuple[Tensor, Tensor]:
    """open_clip's unit embeddings of the images, preprocessed as the scorer does, and of PROMPTS."""
    return unit(model.visual(scorer.clip.preprocess(images))), unit(model.prompts(ids(scorer)))


def test_embeddings_are_open_clips(original: OpenClip, folder: Path) -> None:
    """Image and text embeddings of the converted model equal the plain forward pass to 1e-5, and so do the scores."""
    scorer, images = HPSv2(folder), pictures(3, 40, 56)
    seen, read = embeddings(original, scorer, images)
    assert (scorer.clip.images(images) - seen).abs().max() < 1e-5
    assert (scorer.clip.prompts(PROMPTS) - read).abs().max() < 1e-5
    torch.testing.assert_close(scorer.score(images, PROMPTS), (seen * read).sum(1), atol=1e-5, rtol=1e-4)
    assert min(seen.std(0).max(), read.std(0).max()) > 0.02  # they differ from one another


def test_its_files_are_all_it_needs(folder: Path, tmp_path: Path) -> None:
    """A folder of these alone gives the same scores; the checkpoint is one of them, another version's is not."""
    scorer = HPSv2(folder)
    assert {Path(file).name for file in scorer.files} & {*VERSIONS.values()} == {CHECKPOINT}
    again = HPSv2(copies(scorer.files, tmp_path / "all"))
    assert torch.equal(again.score(pictures(), PROMPTS), scorer.score(pictures(), PROMPTS))


def test_the_comparison_sees_every_weight(original: OpenClip, folder: Path) -> None:
    """Negative control: any one weight shifted in the reference alone moves an embedding by more than the bound."""
    scorer, images = HPSv2(folder), pictures(3, 40, 56)
    ours = scorer.clip.images(images), scorer.clip.prompts(PROMPTS)
    blind = []
    for name, weight in original.state_dict().items():
        before = weight.clone()
        weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        theirs = embeddings(original, scorer, images)
        weight.copy_(before)
        if max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) < 1e-4:
            blind.append(name)
    assert blind == ["logit_scale"]  # no part of the score


def test_quick_gelu_is_seen(original: OpenClip, folder: Path, tmp_path: Path) -> None:
    """Negative control: with OpenAI's activation, which ViT-H does not have, the embeddings differ."""
    shutil.copytree(folder, tmp_path / "quick")
    tiny_clip.write_settings(tmp_path / "quick", "quick_gelu")
    scorer = HPSv2(tmp_path / "quick")
    assert (scorer.clip.images(pictures()) - embeddings(original, scorer, pictures())[0]).abs().max() > 1e-3


def test_every_weight_has_one_name(original: OpenClip) -> None:
    """The converted names and shapes are those of transformers' CLIPModel, no more and no fewer."""
    converted = {key: value.shape for key, value in to_transformers(original.state_dict()).items()}
    model = CLIPModel(CLIPConfig.from_dict(tiny_clip.config()))
    assert converted == {key: value.shape for key, value in model.state_dict().items()}


def test_other_ways_to_store_it(original: OpenClip, folder: Path, tmp_path: Path) -> None:
    """A flat table, one from many GPUs ("module."), and half precision give the same scores."""
    scores = HPSv2(folder).score(pictures(), PROMPTS)
    table = original.state_dict()
    stored = [table, {"epoch": 1, "name": "x", "state_dict": {f"module.{k}": v for k, v in table.items()}}]
    for content in (*stored, {key: value.half() for key, value in table.items()}):
        torch.save(content, tiny_clip.write_settings(tmp_path) / CHECKPOINT)
        torch.testing.assert_close(HPSv2(tmp_path).score(pictures(), PROMPTS), scores, atol=2e-3, rtol=0)


def test_versions_are_told_apart(folder: Path, tmp_path: Path) -> None:
    """Each version has its own file; another's beside plain CLIP's weights does not make these pass for HPSv2."""
    shutil.copytree(folder, tmp_path / "both")
    torch.save(OpenClip(1).state_dict(), tmp_path / "both" / VERSIONS["v2.0"])
    first, second = (HPSv2(tmp_path / "both", version=version).score(pictures(), PROMPTS) for version in VERSIONS)
    assert torch.equal(second, HPSv2(folder).score(pictures(), PROMPTS))
    assert not torch.allclose(first, second, atol=1e-3)
    tiny_clip.write(tmp_path / "both")  # plain CLIP, the way that laion's repository has it
    (tmp_path / "both" / CHECKPOINT).unlink()
    assert load_clip(tmp_path / "both").length == LENGTH
    with pytest.raises(ValueError, match=r"lacks HPS_v2.1_compressed.pt; `hf download xswu/HPSv2 HPS_v2.1"):
        HPSv2(tmp_path / "both")
    with pytest.raises(ValueError, match="no version 'v3'"):
        HPSv2(folder, version="v3")


BROKEN = {
    "a hostile pickle": (lambda _: pickle.dumps(print, protocol=2), "refused"),
    "no tensors": ({"state_dict": {"a": 1}}, "no table of tensors"),
    "a list": ([1, 2], "no table of tensors"),
    "a flat projection": (lambda table: table | {"visual.proj": torch.ones(3)}, "visual.proj has the shape"),
    "a number for many": (lambda table: table | {"visual.ln_pre.bias": torch.tensor(1.0)}, "ln_pre.bias has the shape"),
    "two thirds": (
        lambda table: table | {"transformer.resblocks.0.attn.in_proj_bias": torch.ones(2)},
        "zip|do not fit",
    ),
    "another width": (lambda table: table | {"visual.proj": torch.ones(32, 7)}, "do not fit config.json"),
    "one too many": (lambda table: table | {"score_predictor.weight": torch.ones(2)}, "too many: score_predictor"),
    "one too few": (lambda table: {k: v for k, v in table.items() if k != "ln_final.bias"}, "lack text_model.final"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused(original: OpenClip, tmp_path: Path, case: str) -> None:
    """Each broken checkpoint is one line that says what is wrong and what to download."""
    content, message = BROKEN[case]
    made = content(dict(original.state_dict())) if callable(content) else content
    path = tiny_clip.write_settings(tmp_path) / CHECKPOINT
    if isinstance(made, bytes):
        path.write_bytes(made)
    else:
        torch.save(made, path)
    with pytest.raises(ValueError, match=message) as caught:
        HPSv2(tmp_path)
    assert "\n" not in str(caught.value)
    assert "hf download xswu/HPSv2" in str(caught.value)
