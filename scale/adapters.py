"""Reading adapter files of strangers onto a pipeline's denoiser."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

FILE_NAMES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
REFUSED = {
    "DoRA": ("dora_scale", "lora_magnitude_vector"),
    "text-encoder": ("text_encoder", "lora_te"),
}


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """ "unet" or "transformer", whichever the pipeline has; ValueError for neither."""
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer to put adapters on")


def denoiser_of(pipe: DiffusionPipeline) -> Any:
    """The pipeline's UNet or transformer."""
    return getattr(pipe, denoiser_name(pipe))


def lora_layers(denoiser: nn.Module) -> list[LoraLayer]:
    """Every LoRA layer of a denoiser, in the order of its modules."""
    return [module for module in denoiser.modules() if isinstance(module, LoraLayer)]


def load_adapter(pipe: DiffusionPipeline, path: str | Path, name: str) -> None:
    """Put a LoRA file on the pipeline's denoiser as the peft adapter `name`, frozen and in eval mode.

    `path` is a `.safetensors` file, a `.bin` pickle (read with `weights_only=True`), or a folder with one of them
    under diffusers' usual name. Keys are diffusers' or kohya's. Alpha is the rank where the file says nothing.

    Raises:
        ValueError: no such file; a pickle that asks for code; no LoRA keys for this denoiser; NaN or infinite values;
            DoRA or text-encoder parts; layers that the denoiser lacks or that have other shapes; a name in use.
    """
    file = _find(Path(path))
    denoiser, component = denoiser_of(pipe), denoiser_name(pipe)
    if name in getattr(denoiser, "peft_config", {}):
        raise ValueError(f"the denoiser already has an adapter named {name!r}; choose another name")
    weights, metadata = _read(file)
    _check_values(weights, file)
    weights, alphas = _to_peft(pipe, weights, component, file)
    _check_shapes(denoiser, weights, component, file)
    if alphas:
        metadata = None  # kohya's files carry alphas as tensors
    denoiser.load_lora_adapter(
        weights, prefix=component, adapter_name=name, network_alphas=alphas or None, metadata=metadata
    )
    touched = [layer for layer in lora_layers(denoiser) if name in layer.lora_A]
    if not touched:
        denoiser.delete_adapters(name)
        raise ValueError(
            f"{file} changes no layer of {type(denoiser).__name__}; was it made for another base model?"
        )
    for layer in touched:
        # loading leaves LoRA layers in train mode, where a saved dropout would make two equal calls differ
        layer.eval().requires_grad_(False)
        layer.lora_A[name].to(denoiser.dtype)
        layer.lora_B[name].to(denoiser.dtype)


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        for name in FILE_NAMES:
            if (path / name).is_file():
                return path / name
        raise ValueError(
            f"the adapter folder {path} holds none of {', '.join(FILE_NAMES)}; name the file itself"
        )
    raise ValueError(f"no adapter at {path}; give a LoRA file or a folder that holds {FILE_NAMES[0]}")


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors of a file, and the LoRA settings that diffusers writes into a safetensors header."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                header = (opened.metadata() or {}).get("lora_adapter_metadata")
                return {key: opened.get_tensor(key) for key in opened.keys()}, json.loads(
                    header
                ) if header else None
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is refused: its pickle wants to run code; ask for a .safetensors file"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file} is no readable adapter file: {_first_line(error)}") from error
    if not isinstance(weights, dict) or not all(
        isinstance(v, Tensor) and isinstance(k, str) for k, v in weights.items()
    ):
        raise ValueError(f"{file} holds no table of tensors, so it is no adapter")
    return weights, None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _check_values(weights: Mapping[str, Tensor], file: Path) -> None:
    for kind, marks in REFUSED.items():
        key = next((key for key in weights if any(mark in key for mark in marks)), None)
        if key is not None:
            raise ValueError(
                f"{file} has a {kind} part ({key}), which is not supported; use a plain LoRA of the denoiser"
            )
    for key, value in weights.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"{file} contains NaN or infinite values in {key}; the training that made it diverged"
            )


def _to_peft(
    pipe: DiffusionPipeline, weights: dict[str, Tensor], component: str, file: Path
) -> tuple[dict[str, Tensor], dict[str, float] | None]:
    """Keys `component.module.lora_A.weight` and `.lora_B.weight`, and kohya's alphas if there are any."""
    alphas = None
    if weights and all(key.startswith(("lora_unet_", "lora_transformer_")) for key in weights):
        weights, alphas = type(pipe).lora_state_dict(weights)  # pyright: ignore[reportAttributeAccessIssue]
    own = {
        key.removeprefix(f"{component}."): value
        for key, value in weights.items()
        if key.startswith(f"{component}.")
    }
    if own and "lora_A" not in next(iter(own)):
        own = convert_unet_state_dict_to_peft(own)
    own = {f"{component}.{key}": value for key, value in own.items()}
    if not any(".lora_A." in key for key in own):
        keys = ", ".join(list(weights)[:3]) or "none"
        raise ValueError(
            f"{file} has no LoRA keys for the {component}, so it changes no layer; its keys: {keys}"
        )
    return own, alphas


def _check_shapes(denoiser: nn.Module, weights: Mapping[str, Tensor], component: str, file: Path) -> None:
    """Every pair of factors must fit a Linear or Conv2d layer of the denoiser."""
    modules = {_plain(key): module for key, module in denoiser.named_modules()}
    for key, value in weights.items():
        path, _, factor = key.removeprefix(f"{component}.").rpartition(".lora_")
        layer = modules.get(path)
        layer = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        if not isinstance(layer, nn.Linear | nn.Conv2d) or factor not in ("A.weight", "B.weight"):
            raise ValueError(
                f"{file} changes {key}, which {type(denoiser).__name__} does not have; wrong base model?"
            )
        other = weights.get(f"{component}.{path}.lora_{'B' if factor[0] == 'A' else 'A'}.weight")
        expected = _shape_of(
            layer, factor[0], rank=value.shape[0 if factor[0] == "A" else 1] if value.ndim > 1 else 0
        )
        if (
            tuple(value.shape) != expected
            or other is None
            or other.shape[factor[0] == "A"] != expected[factor[0] != "A"]
        ):
            raise ValueError(
                f"{file} has shape {tuple(value.shape)} for {key}, the denoiser's layer takes {expected}; wrong base model?"
            )


def _plain(key: str) -> str:
    """A module's name as if no adapter had wrapped its parents or itself."""
    return key.replace(".base_layer", "")


def _shape_of(layer: nn.Linear | nn.Conv2d, factor: str, rank: int) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return (rank, layer.in_features) if factor == "A" else (layer.out_features, rank)
    return (
        (rank, layer.in_channels, *layer.kernel_size) if factor == "A" else (layer.out_channels, rank, 1, 1)
    )
