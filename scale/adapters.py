"""Reading adapter files of strangers onto a pipeline's denoiser."""

import contextlib
import json
import math
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft, logging
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FILE_NAMES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
REFUSED = {
    "DoRA": ("dora_scale", "lora_magnitude_vector"),
    "text-encoder": ("text_encoder", "lora_te"),
}


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """Either "unet" or "transformer", whichever the pipeline has; ValueError for neither."""
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer to put adapters on")


def denoiser_of(pipe: DiffusionPipeline) -> Any:
    """The pipeline's UNet or transformer."""
    return getattr(pipe, denoiser_name(pipe))


def lora_layers(denoiser: nn.Module) -> list[Any]:
    """Every LoRA layer of a denoiser, in the order of its modules."""
    return [module for module in denoiser.modules() if isinstance(module, LoraLayer)]


def load_adapter(pipe: DiffusionPipeline, path: str | Path, name: str) -> None:
    """Put a LoRA file on the pipeline's denoiser as the peft adapter `name`, frozen and in eval mode.

    `path` is a `.safetensors` file, a `.bin` pickle (read with `weights_only=True`), or a folder with one of them
    under diffusers' usual name. Keys are diffusers' or kohya's. Alpha is the rank where the file says nothing.

    Raises:
        ValueError: no such file; a pickle that asks for code; no LoRA keys for this denoiser; NaN or infinite values;
            DoRA or text-encoder parts; layers that the denoiser lacks or that have other shapes; a name in use, or one
            that peft cannot hold.
    """
    file = _find(Path(path))
    denoiser, component = denoiser_of(pipe), denoiser_name(pipe)
    _check_name(name, denoiser)
    weights, header = _read(file)
    _check_values(weights, file)
    weights, alphas = _to_peft(pipe, weights, component, file)
    _check_shapes(denoiser, weights, component, file)
    scales = _scales(weights, alphas, _settings(header, component, file), component)
    try:
        with _quiet():
            denoiser.load_lora_adapter(weights, prefix=component, adapter_name=name)
        _prepare(denoiser, name, scales)
    except Exception as error:  # whatever peft and diffusers think of a file that passed every check above
        raise ValueError(f"{file} cannot be loaded: {_first_line(error)}") from error


def _check_name(name: str, denoiser: nn.Module) -> None:
    if name in getattr(denoiser, "peft_config", {}):
        raise ValueError(f"the denoiser already has an adapter named {name!r}; choose another name")
    # torch keys modules by these names, and peft and the blenders keep two of them for the bare model
    if not name or "." in name or name in ("base", "__base__"):
        raise ValueError(f"no adapter can be named {name!r}; choose a name without dots, and not base")


def _prepare(denoiser: nn.Module, name: str, scales: Mapping[str, float]) -> None:
    """Give the new adapter's layers their scaling, and freeze them."""
    layers = {module: layer for module, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)}
    added: dict[str, Any] = {module: layer for module, layer in layers.items() if name in layer.lora_A}
    for module, layer in added.items():
        layer.scaling[name] = scales[_plain(module)]
        # loading leaves LoRA layers in train mode, where a saved dropout would make two equal calls differ
        layer.eval().requires_grad_(False)
        layer.lora_A[name].to(denoiser.dtype)
        layer.lora_B[name].to(denoiser.dtype)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what diffusers and peft say of a second adapter: that there is a first, and that its keys are missing.

    Errors are silent too: they are raised, and said once.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        for name in FILE_NAMES:
            if (path / name).is_file():
                return path / name
        raise ValueError(f"the adapter folder {path} holds none of {', '.join(FILE_NAMES)}; name the file itself")
    raise ValueError(f"no adapter at {path}; give a LoRA file or a folder that holds {FILE_NAMES[0]}")


def _read(file: Path) -> tuple[dict[str, Tensor], str | None]:
    """Tensors of a file, and the LoRA settings (JSON) that diffusers writes into a safetensors header."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
                return weights, (opened.metadata() or {}).get("lora_adapter_metadata")
        with warnings.catch_warnings(action="ignore"):  # torch's doubts about a pickle that it then refuses
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is refused: it is no pickle of tensors alone, and another could run code; "
            "ask for a .safetensors file"
        ) from error
    except Exception as error:  # a hostile file can make a parser raise anything
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
        if value.dtype not in FLOATS:
            raise ValueError(f"{file} stores {key} as {value.dtype}; save it as float16, bfloat16 or float32")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{file} contains NaN or infinite values in {key}; the training that made it diverged")


def _to_peft(
    pipe: DiffusionPipeline, given: dict[str, Tensor], component: str, file: Path
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Keys `component.module.lora_A.weight` and `.lora_B.weight`, and the alphas that are tensors, by module."""
    weights = _from_kohya(pipe, given, component, file)
    own = {key.removeprefix(f"{component}."): v for key, v in weights.items() if key.startswith(f"{component}.")}
    alphas = {key.removesuffix(".alpha"): own.pop(key) for key in list(own) if key.endswith(".alpha")}
    if not any("lora_A" in key for key in own):
        own = convert_unet_state_dict_to_peft(own)
    if not any(".lora_A." in key for key in own):
        keys = ", ".join(list(given)[:3]) or "none"
        raise ValueError(f"{file} has no LoRA keys for the {component}, so it changes no layer; its keys: {keys}")
    alphas |= _kohya_alphas(given, own)
    if any(alpha.numel() != 1 for alpha in alphas.values()):
        raise ValueError(f"{file} has an alpha that is no single number; was it saved whole?")
    # sorted: diffusers judges the format by the first key, which must be a lora_A
    return {f"{component}.{key}": own[key] for key in sorted(own)}, {key: float(v) for key, v in alphas.items()}


def _from_kohya(pipe: Any, given: dict[str, Tensor], component: str, file: Path) -> dict[str, Tensor]:
    """diffusers' names for kohya's keys, if all are kohya's; SDXL's block numbers follow from the UNet's settings."""
    if not (given and all(key.startswith(("lora_unet_", "lora_transformer_")) for key in given)):
        return given
    options = {"unet_config": pipe.unet.config} if component == "unet" else {}
    try:
        return type(pipe).lora_state_dict(dict(given), **options)[0]
    except Exception as error:
        raise ValueError(f"{file} has keys that are not kohya's for this model: {_first_line(error)}") from error


def _kohya_alphas(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """kohya's alphas by the modules of `own`.

    diffusers renames kohya's tensors without copying them, so a tensor tells the key it came from. (Its own names for
    the alphas miss those of attention layers.)
    """
    stems = {id(tensor): key.removesuffix(".lora_down.weight") for key, tensor in given.items()}
    found = {
        key.removesuffix(".lora_A.weight"): given.get(f"{stems.get(id(tensor))}.alpha") for key, tensor in own.items()
    }
    return {module: alpha for module, alpha in found.items() if alpha is not None}


def _settings(header: str | None, component: str, file: Path) -> dict[str, Any]:
    """The header's settings for this denoiser that change what the tensors mean; the rest never reaches peft."""
    try:
        given = json.loads(header or "{}")
        settings = {key.removeprefix(f"{component}."): v for key, v in given.items() if key.startswith(f"{component}.")}
        alphas = [settings.get("lora_alpha", 1), *(settings.get("alpha_pattern") or {}).values()]
        readable = all(isinstance(alpha, int | float) and math.isfinite(alpha) for alpha in alphas)
        # peft reads patterns as regular expressions, and a stranger's may run for ever: names of modules alone pass
        readable &= all(re.fullmatch(r"\^?[\w.]+", name) for name in settings.get("alpha_pattern") or {})
    except (ValueError, RecursionError, AttributeError, OverflowError):
        readable, settings = False, {}
    if not readable:
        raise ValueError(f"{file} has LoRA settings in its header that cannot be read; save it again")
    if settings.get("use_dora"):
        raise ValueError(f"{file} is a DoRA, which is not supported; use a plain LoRA of the denoiser")
    return settings


def _scales(
    weights: Mapping[str, Tensor], alphas: Mapping[str, float], settings: Mapping[str, Any], component: str
) -> dict[str, float]:
    """`alpha / rank` by module: its own alpha, else the header's, else the rank."""
    patterns, scales = settings.get("alpha_pattern") or {}, {}
    for key, value in weights.items():
        module, _, factor = key.removeprefix(f"{component}.").rpartition(".lora_")
        if factor == "A.weight":
            rank = value.shape[0]
            named = [v for name, v in patterns.items() if f".{module}".endswith("." + name.removeprefix("^"))]
            alpha = alphas.get(module, named[0] if named else settings.get("lora_alpha", rank))
            scales[module] = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    return scales


def _check_shapes(denoiser: nn.Module, weights: Mapping[str, Tensor], component: str, file: Path) -> None:
    """Every pair of factors must fit a Linear or Conv2d layer of the denoiser."""
    # a layer that another adapter wraps counts by its own name; the other adapter's factors do not count
    modules = {_plain(key): module for key, module in denoiser.named_modules() if ".lora_" not in key}
    for key, value in weights.items():
        path, _, factor = key.removeprefix(f"{component}.").rpartition(".lora_")
        layer = modules.get(path)
        if not isinstance(layer, nn.Linear | nn.Conv2d) or factor not in ("A.weight", "B.weight"):
            raise ValueError(f"{file} changes {key}, which {type(denoiser).__name__} does not have; wrong base model?")
        down, up = (weights.get(f"{component}.{path}.lora_{which}.weight") for which in "AB")
        if down is None or up is None:
            raise ValueError(f"{file} has {key} without its other factor; was it saved whole?")
        rank = down.shape[0] if down.ndim else 0
        expected = dict(zip(("A.weight", "B.weight"), _factor_shapes(layer, rank), strict=True))[factor]
        if tuple(value.shape) != expected or rank == 0:
            raise ValueError(
                f"{file} has shape {tuple(value.shape)} for {key}, but rank {rank} needs {expected}; wrong base model?"
            )


def _plain(key: str) -> str:
    """A module's name as if no adapter had wrapped it."""
    return key.replace(".base_layer", "")


def _factor_shapes(layer: nn.Linear | nn.Conv2d, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the factors A (down) and B (up) of a layer."""
    if isinstance(layer, nn.Linear):
        return (rank, layer.in_features), (layer.out_features, rank)
    return (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank, 1, 1)
