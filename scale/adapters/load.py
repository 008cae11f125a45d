"""Adapter files onto a pipeline's denoiser."""

import contextlib
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from scale.adapters.checks import check_fit, check_name, check_parts, check_scales, check_unmerged, check_values
from scale.adapters.denoiser import denoiser_name, denoiser_of, lora_layers
from scale.adapters.find import adapter_file
from scale.adapters.formats import read_factors
from scale.adapters.read import first_line, read
from scale.adapters.settings import strength


class Scaled(NamedTuple):
    """A layer's factors with the alpha that holds for them."""

    down: Tensor
    up: Tensor
    rank: int
    alpha: float


def load_adapter(pipe: DiffusionPipeline, path: str | Path, name: str) -> None:
    """Put a LoRA file on the pipeline's denoiser as the peft adapter `name`, frozen and in eval mode.

    `path` is a `.safetensors` file, a pickle (read with `weights_only=True`), or a folder with one of them. Keys are
    diffusers' (of any version), PEFT's or kohya's, told apart by themselves. Alpha is what the tensors, the header or
    PEFT's `adapter_config.json` say, else the rank. The factors take the denoiser's dtype and device.

    Raises:
        ValueError: no such file; a pickle that asks for code; no LoRA keys for this denoiser; NaN or infinite values;
            parts that are no plain LoRA (DoRA, LoHa, biases ...) or are the text encoder's; layers that the denoiser
            lacks or that have other shapes; a name in use, or one that peft cannot hold; adapters fused into the
            denoiser. The denoiser is then as it was.
    """
    denoiser = denoiser_of(pipe)
    check_name(name, denoiser)
    check_unmerged(denoiser)
    file = read(adapter_file(Path(path)))
    check_parts(file, denoiser)
    rule = strength(file.settings, denoiser_name(pipe), file.path)
    factors = read_factors(pipe, file)
    check_fit(factors, denoiser, file.path)
    check_values(factors, denoiser.dtype, file.path)
    layers = {
        module: Scaled(pair.down, pair.up, pair.rank, rule.of(module, pair.rank, pair.alpha))
        for module, pair in factors.items()
    }
    check_scales((layer.alpha / layer.rank for layer in layers.values()), denoiser.dtype, file.path)
    trainable = {parameter: parameter.requires_grad for parameter in denoiser.parameters()}
    try:
        _inject(pipe, denoiser, layers, name)
    except Exception as error:  # whatever peft and diffusers think of a file that passed every check above
        _undo(denoiser, name, trainable)
        raise ValueError(f"{file.path} cannot be loaded: {first_line(error)}") from error


def _inject(pipe: DiffusionPipeline, denoiser: Any, layers: Mapping[str, Scaled], name: str) -> None:
    dtype = denoiser.dtype  # once: diffusers walks all modules for it
    # copies: a file may change under a memory map, and what diffusers split shares memory, which cannot be saved
    state = {
        f"{module}.lora_{which}.weight": factor.detach().to(dtype, copy=True).contiguous()
        for module, layer in layers.items()
        for which, factor in (("A", layer.down), ("B", layer.up))
    }
    ranks, alphas = {m: layer.rank for m, layer in layers.items()}, {m: layer.alpha for m, layer in layers.items()}
    settings = {
        "r": _most_common(ranks),
        "lora_alpha": _most_common(alphas),
        "rank_pattern": _patterns(ranks),
        "alpha_pattern": _patterns(alphas),
        "target_modules": list(layers),
    }
    # whole-model offloading finds the new layers by itself, and diffusers would set it up again on another device
    offloaded = any(isinstance(getattr(part, "_hf_hook", None), CpuOffload) for part in pipe.components.values())
    with _quiet():
        denoiser.load_lora_adapter(
            state,
            prefix=None,
            adapter_name=name,
            metadata=settings,
            low_cpu_mem_usage=True,  # no random start, which would draw from the global generator
            _pipeline=None if offloaded else pipe,
        )
    # by module, as everyone else writes them, for whoever saves the adapter again
    config = denoiser.peft_config[name]
    config.rank_pattern, config.alpha_pattern = _exceptions(ranks), _exceptions(alphas)
    added = [layer for layer in lora_layers(denoiser) if name in layer.lora_A]
    if len(added) != len(layers):
        raise ValueError(f"{len(added)} of {len(layers)} layers took the adapter")
    for layer in added:
        # loading leaves LoRA layers in train mode
        layer.eval().requires_grad_(False)
        layer.lora_A[name].to(dtype)
        layer.lora_B[name].to(dtype)


def _most_common(values: Mapping[str, int | float]) -> int | float:
    return Counter(values.values()).most_common(1)[0][0]


def _exceptions(values: Mapping[str, int | float]) -> dict[str, int | float]:
    """The modules whose value is not the most common one, in peft's notation for a whole name."""
    common = _most_common(values)
    return {f"^{module}": value for module, value in values.items() if value != common}


def _patterns(values: Mapping[str, int | float]) -> dict[str, int | float]:
    """The same as one expression a value: peft compiles each for each layer, 18 s for SDXL where all ranks differ."""
    modules: dict[int | float, list[str]] = defaultdict(list)
    for module, value in values.items():
        modules[value].append(re.escape(module))
    del modules[_most_common(values)]
    return {f"^(?:{'|'.join(names)})": value for value, names in modules.items()}


def _undo(denoiser: Any, name: str, trainable: Mapping[nn.Parameter, bool]) -> None:
    """Take a half-loaded adapter off: the layers that it alone has wrapped, and what peft noted of it."""
    wrapped = {path: layer for path, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)}
    for path, layer in wrapped.items():
        with _quiet():
            layer.delete_adapter(name)
        if not layer.lora_A and not layer.lora_embedding_A:
            denoiser.set_submodule(path, layer.get_base_layer())
    configs = getattr(denoiser, "peft_config", {})
    configs.pop(name, None)
    if not configs:
        denoiser._hf_peft_config_loaded = False
        with contextlib.suppress(AttributeError):
            del denoiser.peft_config
    for parameter, required in trainable.items():
        parameter.requires_grad_(required)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what diffusers and peft say of a second adapter: there is a first, its keys are missing, it acts again.

    Errors are silent too: they are raised, and said once.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            for message in ("Already found a `peft_config`", "Adapter .* was active which is now deleted"):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logging.set_verbosity(verbosity)
