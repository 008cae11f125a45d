"""What is no plain LoRA of this denoiser, and why: found before anything changes."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from scale.adapters.denoiser import lora_layers, plain_layers
from scale.adapters.formats import Factors
from scale.adapters.read import AdapterFile, shown

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
UNSUPPORTED = {
    "DoRA": r"dora_scale|lora_magnitude_vector",
    "text-encoder": r"text_encoder|lora_te|text_model\.",
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "OFT": r"\.oft_",
    "Tucker": r"\.lora_mid\.",
    "full-weight": r"\.diff(_b)?$|\.set_weight$|\.modules_to_save\.",
    "bias": r"\.lora_?[._](A|B|down|up)(\.default)?\.bias$",
}
RESERVED = ("base", "__base__")  # the bare model, in the blenders and in peft


def check_name(name: str, denoiser: nn.Module) -> None:
    """ValueError for a name that is in use, or that torch and peft cannot hold."""
    if name in getattr(denoiser, "peft_config", {}):
        raise ValueError(f"the denoiser already has an adapter named {name!r}; choose another name")
    # peft keys a ModuleDict by the name, in which dots part modules and the names of methods are taken
    if not name or "." in name or name in RESERVED or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"no adapter can be named {name!r}; choose one without dots, not base, no word of torch's")


def check_unmerged(denoiser: nn.Module) -> None:
    """ValueError for a denoiser some of whose adapters are fused into its weights."""
    merged = {name for layer in lora_layers(denoiser) for name in layer.merged_adapters}
    if merged:
        names = shown(sorted(merged))
        raise ValueError(f"adapters are fused into the denoiser ({names}); call pipe.unfuse_lora() first")


def check_parts(file: AdapterFile, denoiser: nn.Module) -> None:
    """ValueError for what no LoRA of a denoiser holds: parts of another kind, numbers that are no floats."""
    for kind, marks in UNSUPPORTED.items():
        if key := next((key for key in file.tensors if re.search(marks, key)), None):
            raise ValueError(
                f"{file.path} has a {kind} part ({key:.100}), which is not supported; use a plain LoRA of the denoiser"
            )
    most = 4 * len(plain_layers(denoiser))  # two factors and an alpha a layer
    if len(file.tensors) > most:
        raise ValueError(f"{file.path} has {len(file.tensors)} tensors, more than the denoiser's layers could take")
    for key, value in file.tensors.items():
        if value.dtype not in FLOATS and not key.endswith(".alpha"):
            raise ValueError(f"{file.path} stores {key} as {value.dtype}; save it as float16, bfloat16 or float32")


def check_fit(factors: Mapping[str, Factors], denoiser: nn.Module, path: Path) -> None:
    """ValueError unless every pair of factors fits a Linear or Conv2d layer of the denoiser."""
    layers = plain_layers(denoiser)
    for module, pair in factors.items():
        layer = layers.get(module)
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            model = type(denoiser).__name__
            raise ValueError(f"{path} changes {module}, which {model} does not have; wrong base model?")
        if isinstance(layer, nn.Conv2d) and (layer.groups > 1 or layer.dilation != (1, 1)):
            raise ValueError(f"{path} changes {module}, a convolution with groups or dilation, which peft cannot adapt")
        for name, factor, expected in zip(("down", "up"), (pair.down, pair.up), _shapes(layer, pair.rank), strict=True):
            if tuple(factor.shape) != expected or not pair.rank:
                raise ValueError(
                    f"{path} has shape {tuple(factor.shape)} for the {name} factor of {module}, "
                    f"but rank {pair.rank} needs {expected}; wrong base model?"
                )


def _shapes(layer: nn.Linear | nn.Conv2d, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the factors A (down) and B (up) of a layer."""
    if isinstance(layer, nn.Linear):
        return (rank, layer.in_features), (layer.out_features, rank)
    return (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank, 1, 1)


def check_values(factors: Mapping[str, Factors], dtype: torch.dtype, path: Path) -> None:
    """ValueError for NaN or infinite values, also those that only the denoiser's `dtype` makes infinite."""
    for module, pair in factors.items():
        for factor in (pair.down, pair.up):
            if bool(torch.isfinite(factor.to(dtype)).all()):
                continue
            if bool(torch.isfinite(factor).all()):
                raise ValueError(f"{path} has values for {module} too large for {dtype}; use the denoiser in float32")
            raise ValueError(f"{path} contains NaN or infinite values for {module}; the training that made it diverged")


def check_scales(scales: Iterable[float], dtype: torch.dtype, path: Path) -> None:
    """ValueError for a strength (alpha / rank) that the denoiser's `dtype` cannot hold."""
    largest = max(map(abs, scales), default=0.0)
    if not largest <= torch.finfo(dtype).max:
        raise ValueError(f"{path} multiplies its factors by {largest:g}, too large for {dtype}; is its alpha right?")
