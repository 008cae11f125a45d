"""Every format of adapter files, on every family of denoisers: each layer gets what the file says, made by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from scale.adapters import denoiser_name, denoiser_of, load_adapter, lora_layers
from tests.scale import adapter_files as files
from tests.scale import tiny


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    """One pipeline a family; its adapters are taken off after each load."""
    return {family: make() for family, make in files.MAKERS.items()}


def randomised(denoiser: nn.Module) -> None:
    """Both factors of every LoRA layer at random: a new one's B is zero."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in denoiser.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("format", files.WRITERS)
@pytest.mark.parametrize("family", files.MAKERS)
def test_every_format_adds_what_it_stores(pipes: dict[str, Any], tmp_path: Path, family: str, format: str) -> None:
    """Linear and Conv2d layers of ranks 2, 3 and 5 get B A under each format's names, and no other layer changes."""
    pipe = pipes[family]
    adapter = files.random_adapter(pipe)
    load_adapter(pipe, files.WRITERS[format](adapter, denoiser_name(pipe), tmp_path), "a")
    files.assert_adds(pipe, adapter)
    denoiser_of(pipe).unload_lora()


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_attention_processors_of_diffusers_0_14(pipes: dict[str, Any], tmp_path: Path, family: str) -> None:
    """The reference implementation's pickles load; diffusers' own pipeline takes nothing from them, with a warning."""
    pipe = pipes[family]
    adapter = files.random_adapter(pipe, files.ATTENTION)
    load_adapter(pipe, files.processors(adapter, "unet", tmp_path), "a")
    files.assert_adds(pipe, adapter)
    pipe.unet.unload_lora()


@pytest.mark.parametrize("family", files.MAKERS)
def test_what_a_model_saves_loads_again(pipes: dict[str, Any], tmp_path: Path, family: str) -> None:
    """`save_lora_adapter` keeps alphas in the header: the loaded copy adds the same, and saves the same again."""
    pipe, settings = pipes[family], {"lora_alpha": 6, "alpha_pattern": {"to_q": 1}, "rank_pattern": {"to_out.0": 2}}
    denoiser = denoiser_of(pipe)
    targets = ["to_q", "to_k", "to_out.0", "proj_in"]
    denoiser.add_adapter(LoraConfig(r=3, target_modules=targets, **settings), adapter_name="a")
    randomised(denoiser)
    adapter = {
        path: (layer.lora_A["a"].weight.detach().clone(), layer.lora_B["a"].weight.detach().clone())
        for path, layer in denoiser.named_modules()
        if hasattr(layer, "lora_A") and "a" in layer.lora_A
    }
    denoiser.save_lora_adapter(tmp_path / "first", adapter_name="a")
    denoiser.unload_lora()

    def scale(path: str) -> float:
        return (1 if path.endswith("to_q") else 6) / (2 if path.endswith("to_out.0") else 3)

    for folder, following in (("first", "second"), ("second", "third")):
        load_adapter(pipe, tmp_path / folder, "a")
        files.assert_adds(pipe, adapter, scale)
        denoiser.save_lora_adapter(tmp_path / following, adapter_name="a")
        denoiser.unload_lora()


@pytest.mark.parametrize("stabilised", [False, True], ids=["plain", "rank-stabilised"])
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_what_peft_saves_does_what_peft_does(tmp_path: Path, family: str, stabilised: bool) -> None:
    """PEFT's own folder, with ranks, alphas and their patterns, changes every layer as PEFT's own model does."""
    theirs, ours = files.MAKERS[family](), files.MAKERS[family]()
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=["to_q", "to_k", "to_out.0"],
        rank_pattern={"to_q": 2},
        alpha_pattern={"to_k": 7, "0.attn.to_q" if family == "flux" else "attn1.to_q": 5},
        use_rslora=stabilised,
    )
    model = get_peft_model(denoiser_of(theirs), config)
    randomised(model)
    model.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path, "a")
    pairs = list(zip(lora_layers(denoiser_of(ours)), lora_layers(model), strict=True))
    assert len({layer.scaling["default"] for _, layer in pairs}) > 2
    for mine, layer in pairs:
        x = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(mine(x), layer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [2, 2.0, 5.0])
@pytest.mark.parametrize("family", files.MAKERS)
def test_kohyas_alpha(pipes: dict[str, Any], tmp_path: Path, family: str, alpha: float) -> None:
    """kohya's alpha tensors, whole numbers too, divide by each layer's own rank."""
    pipe = pipes[family]
    adapter = files.random_adapter(pipe)
    load_adapter(pipe, files.kohya(adapter, "", tmp_path, alpha), "a")
    files.assert_adds(pipe, adapter, lambda layer: alpha / len(adapter[layer][0]))
    denoiser_of(pipe).unload_lora()


DIFFUSERS_OWN = [(family, format) for family in files.MAKERS for format in ("pipeline", "old pipeline")]


# of SD3 diffusers itself reads no kohya file, and of Flux none with diffusers' names
@pytest.mark.parametrize(("family", "format"), [*DIFFUSERS_OWN, ("sd", "kohya"), ("sdxl", "kohya")])
def test_where_diffusers_loads_a_file_we_load_the_same(tmp_path: Path, family: str, format: str) -> None:
    """Every layer's scale and factors equal those of `pipe.load_lora_weights`, bit for bit."""
    theirs, ours = files.MAKERS[family](), files.MAKERS[family]()
    adapter = files.random_adapter(ours, files.ATTENTION, ranks=(4,))
    path = files.WRITERS[format](adapter, denoiser_name(ours), tmp_path)
    theirs.load_lora_weights(path if path.is_dir() else path.parent, weight_name=None if path.is_dir() else path.name)
    load_adapter(ours, path, "a")
    (name,) = denoiser_of(theirs).peft_config
    pairs = list(zip(lora_layers(denoiser_of(ours)), lora_layers(denoiser_of(theirs)), strict=True))
    assert pairs
    for mine, layer in pairs:
        assert mine.scaling["a"] == layer.scaling[name]
        assert torch.equal(mine.lora_A["a"].weight, layer.lora_A[name].weight)
        assert torch.equal(mine.lora_B["a"].weight, layer.lora_B[name].weight)


def test_a_peft_file_without_its_config_has_alpha_of_its_rank(tmp_path: Path) -> None:
    """And a config that states an alpha of a file that is not PEFT's own is no concern of that file."""
    pipe = tiny.sd()
    adapter = files.random_adapter(pipe, ("to_q",))
    (files.peft(adapter, "unet", tmp_path / "peft") / "adapter_config.json").unlink()
    folder = files.pipeline(adapter, "unet", tmp_path / "diffusers")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 64}))
    for path in (tmp_path / "peft", folder):
        load_adapter(pipe, path, "a")
        files.assert_adds(pipe, adapter)
        pipe.unet.unload_lora()


def test_the_denoiser_holds_copies(tmp_path: Path) -> None:
    """A file may be rewritten or removed after loading: the denoiser holds copies, not a map of the file."""
    pipe = tiny.sd()
    adapter = files.random_adapter(pipe)
    path = files.bare(adapter, "unet", tmp_path)
    load_adapter(pipe, path, "a")
    path.write_bytes(bytes(path.stat().st_size))
    files.assert_adds(pipe, adapter)
