"""Random adapters, the names under which trainers store them, and what they must add to their layers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from scale.adapters import denoiser_name, denoiser_of, lora_layers
from tests.scale import tiny

Table = dict[str, Tensor]
Adapter = dict[str, tuple[Tensor, Tensor]]  # by layer: down (A) and up (B)

MAKERS = {"sd": tiny.sd, "sdxl": tiny.sdxl, "sd3": tiny.sd3, "flux": tiny.flux}
TARGETS = {
    "unet": ("to_q", "to_v", "to_out.0", "conv1", "conv_in", "proj_in", "ff.net.0.proj", "time_emb_proj"),
    "transformer": ("to_q", "to_out.0", "add_k_proj", "ff.net.0.proj", "norm1.linear", "proj_out", "pos_embed.proj"),
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def random_adapter(pipe: Any, targets: tuple[str, ...] = (), ranks: tuple[int, ...] = (2, 3, 5)) -> Adapter:
    """Factors for every layer whose name ends in a target, their ranks in turn; for the usual targets if none given."""
    generator = torch.Generator().manual_seed(0)
    ends = tuple(f".{target}" for target in targets or TARGETS[denoiser_name(pipe)])
    found: Adapter = {}
    for name, layer in denoiser_of(pipe).named_modules():
        if f".{name}".endswith(ends):
            rank = ranks[len(found) % len(ranks)]
            down, up = shapes(layer, rank)
            draw = (0.3 * torch.randn(shape, generator=generator) for shape in (down, up))
            found[name] = (next(draw), next(draw))
    assert found
    return found


def shapes(layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the factors A (down) and B (up) of a Linear or Conv2d layer."""
    if isinstance(layer, nn.Conv2d):
        return (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank, 1, 1)
    assert isinstance(layer, nn.Linear)
    return (rank, layer.in_features), (layer.out_features, rank)


def assert_adds(pipe: Any, adapter: Adapter, scale: Callable[[str], float] = lambda _: 1.0, rtol: float = 1e-5) -> None:
    """The adapter "a" wraps the layers of `adapter` and no others, and adds `scale * B A x` to each, by hand.

    `rtol` is relative to the largest output of a layer, from which the layer's own part is subtracted.
    """
    denoiser = denoiser_of(pipe)
    wrapped = {path: layer for path, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)}
    assert {path for path, layer in wrapped.items() if "a" in layer.lora_A} == set(adapter)
    for path, (down, up) in adapter.items():
        layer: Any = wrapped[path]
        base, generator = layer.get_base_layer(), torch.Generator().manual_seed(1)
        if isinstance(base, nn.Conv2d):
            x = torch.randn(2, base.in_channels, 6, 6, generator=generator)
            added = F.conv2d(F.conv2d(x, down, stride=base.stride, padding=base.padding), up)  # pyright: ignore
        else:
            x = torch.randn(3, base.in_features, generator=generator)
            added = x @ (up @ down).T
        x = x.to(denoiser.dtype)
        with_adapter, without = layer(x), base(x)
        atol = rtol * float(with_adapter.abs().max())
        torch.testing.assert_close((with_adapter - without).float(), scale(path) * added, rtol=0, atol=atol)


def assert_untouched(pipe: Any) -> None:
    """No layer is wrapped, and peft has noted nothing."""
    denoiser = denoiser_of(pipe)
    assert not getattr(denoiser, "peft_config", {})
    assert not lora_layers(denoiser)


def pair(adapter: Adapter, name: Callable[[str, str], str], words: tuple[str, str]) -> Table:
    """Both factors of every layer under `name(layer, word)`."""
    return {
        name(layer, word): factor for layer, both in adapter.items() for word, factor in zip(words, both, strict=True)
    }


def write(table: Table, path: Path, header: object = None) -> Path:
    """A safetensors file, with diffusers' LoRA settings in its header if `header` is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = header if isinstance(header, str) else json.dumps(header)
    save_file(table, path, metadata=None if header is None else {"lora_adapter_metadata": settings})
    return path


def pipeline(adapter: Adapter, component: str, folder: Path) -> Path:
    """What diffusers' pipelines write."""
    table = pair(adapter, lambda layer, word: f"{component}.{layer}.{word}.weight", ("lora_A", "lora_B"))
    return write(table, folder / "pytorch_lora_weights.safetensors").parent


def bare(adapter: Adapter, component: str, folder: Path) -> Path:
    """What diffusers' models write, here under a name of its own."""
    return write(
        pair(adapter, lambda layer, word: f"{layer}.{word}.weight", ("lora_A", "lora_B")), folder / "my_style.st"
    )


def old_pipeline(adapter: Adapter, component: str, folder: Path) -> Path:
    """What pipelines wrote before peft."""
    table = pair(adapter, lambda layer, word: f"{component}.{layer}.{word}.weight", ("lora.down", "lora.up"))
    return write(table, folder / "pytorch_lora_weights.safetensors")


def down_up(adapter: Adapter, component: str, folder: Path) -> Path:
    """Names with dots and kohya's words for the factors."""
    table = pair(adapter, lambda layer, word: f"{component}.{layer}.{word}.weight", ("lora_down", "lora_up"))
    return write(table, folder / "my style.safetensors").parent


def processors(adapter: Adapter, component: str, folder: Path) -> Path:
    """diffusers 0.14's attention processors, a pickle: the reference implementation's adapters."""

    def name(layer: str, word: str) -> str:
        attention, _, projection = layer.removesuffix(".0").rpartition(".")
        return f"{attention}.processor.{projection}_lora.{word}.weight"

    folder.mkdir(parents=True, exist_ok=True)
    torch.save(pair(adapter, name, ("down", "up")), folder / "pytorch_lora_weights.bin")
    return folder


def kohya(adapter: Adapter, component: str, folder: Path, alpha: float | None = None) -> Path:
    """kohya's underscores, with the alpha tensors if there is one."""
    stems = {layer: "lora_unet_" + layer.replace(".", "_") for layer in adapter}
    table = pair(adapter, lambda layer, word: f"{stems[layer]}.{word}.weight", ("lora_down", "lora_up"))
    alphas = {} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha) for stem in stems.values()}
    return write(table | alphas, folder / "last.safetensors")


def peft(adapter: Adapter, component: str, folder: Path, **config: object) -> Path:
    """PEFT's folder; the config tells an alpha only if it is given here."""
    table = pair(adapter, lambda layer, word: f"base_model.model.{layer}.{word}.weight", ("lora_A", "lora_B"))
    write(table, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    return folder


WRITERS = {
    "pipeline": pipeline,
    "bare": bare,
    "old pipeline": old_pipeline,
    "down and up": down_up,
    "kohya": kohya,
    "peft": peft,
}
