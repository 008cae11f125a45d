"""The many names under which trainers store a layer's two factors, read as one table.

Known are diffusers' names (of pipelines, of models, of version 0.14's attention processors), PEFT's, and kohya's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor

from scale.adapters.denoiser import denoiser_name
from scale.adapters.kohya import from_kohya
from scale.adapters.read import AdapterFile, shown

FACTOR = re.compile(r"(.+)\.lora(?:_linear_layer)?[_.](A|B|down|up)(?:\.default)?\.weight|(.+)\.(alpha)")
COMPONENTS = ("unet.", "transformer.")
PARTS = {"A": "down", "B": "up"}


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one layer, a Linear or a Conv2d: `alpha / rank` times `up` after `down`.

    `down` is (rank, in) or (rank, in, height, width), `up` (out, rank) or (out, rank, 1, 1). alpha is None where the
    tensors do not say.
    """

    down: Tensor
    up: Tensor
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0] if self.down.ndim else 0


def read_factors(pipe: DiffusionPipeline, file: AdapterFile) -> dict[str, Factors]:
    """The factors of every layer that a file changes, by the name of the layer in a denoiser.

    Raises:
        ValueError: no factors; a tensor that is none; a factor under two names; half a pair; an alpha that is no
            number; kohya's names of blocks for which diffusers knows no others.
    """
    component = denoiser_name(pipe)
    tensors = from_kohya(pipe, file)
    prefixes = re.compile(rf"(?:(?:base_model\.model|module|{component})\.)*")
    named = {prefixes.sub("", key, count=1): value for key, value in tensors.items()}
    named = convert_unet_state_dict_to_peft(named)
    if len(named) < len(tensors):
        raise ValueError(f"{file.path} stores a factor under two names; its keys: {shown(tensors)}")
    matches = {key: match for key in named if (match := FACTOR.fullmatch(key))}
    # the prefix that is left is another component's
    if not any(match[1] and not key.startswith(COMPONENTS) for key, match in matches.items()):
        keys = shown(file.tensors)
        raise ValueError(f"{file.path} has no LoRA keys for the {component}, so it changes no layer; its keys: {keys}")
    if strange := named.keys() - matches.keys():
        raise ValueError(f"{file.path} has tensors that are no factors of a LoRA, and would be lost: {shown(strange)}")
    table: dict[str, dict[str, Tensor]] = {}
    for key, match in matches.items():
        module, part = (found for found in match.groups() if found)
        parts = table.setdefault(module, {})
        if parts.setdefault(PARTS.get(part, part), named[key]) is not named[key]:
            raise ValueError(f"{file.path} stores a factor of {module} under two names, one of them {key}")
    return {module: _pair(module, parts, file.path) for module, parts in table.items()}


def _pair(module: str, parts: Mapping[str, Tensor], path: Path) -> Factors:
    if "down" not in parts or "up" not in parts:
        raise ValueError(f"{path} has {', '.join(parts)} of {module} without its other factor; was it saved whole?")
    return Factors(parts["down"], parts["up"], _alpha(parts["alpha"], module, path) if "alpha" in parts else None)


def _alpha(value: Tensor, module: str, path: Path) -> float:
    if value.numel() != 1 or value.is_complex() or not bool(torch.isfinite(value).all()):
        raise ValueError(f"{path} has an alpha of {module} that is no single number; was it saved whole?")
    return float(value)
