"""kohya's names: "lora_unet_" and a module in underscores.

The module is diffusers' (SD 1.5, trainers of SD3 and Flux that follow diffusers), Stability's (SDXL), or Black Forest
Labs' (Flux). The first are looked up in the denoiser itself, the others are diffusers' own to translate.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor

from scale.adapters.denoiser import denoiser_name, denoiser_of, plain_layers
from scale.adapters.read import AdapterFile, first_line, shown

# ComfyUI writes the same modules with dots
KEY = re.compile(r"(?:lora_unet_|lora_transformer_|diffusion_model\.)(.+?)\.(lora_(?:A|B|down|up)\.weight|alpha)")
DOWN_UP = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
A_B = {word: letter for letter, word in DOWN_UP.items()}


def from_kohya(pipe: DiffusionPipeline, file: AdapterFile) -> dict[str, Tensor]:
    """A file's tensors, kohya's under diffusers' names with dots, and all others as they are.

    Raises:
        ValueError: kohya's keys among others; blocks for which diffusers has no other name; a key that comes twice.
    """
    matches = {key: match for key in file.tensors if (match := KEY.fullmatch(key))}
    if not matches:
        return file.tensors
    if others := file.tensors.keys() - matches.keys():
        raise ValueError(f"{file.path} has keys that are not kohya's beside those that are: {shown(others)}")
    modules = {name.replace(".", "_"): name for name in plain_layers(denoiser_of(pipe))}
    known, strange = {}, {}
    for key, match in matches.items():
        stem, part = match[1].replace(".", "_"), match[2]
        if stem in modules:
            known[f"{modules[stem]}.{A_B.get(part, part)}"] = file.tensors[key]
        else:
            strange[f"lora_unet_{stem}.{DOWN_UP.get(part, part)}"] = file.tensors[key]
    if len(known) + len(strange) < len(file.tensors):
        raise ValueError(f"{file.path} stores a factor under two names; its keys: {shown(file.tensors)}")
    try:
        translate = _from_stability if denoiser_name(pipe) == "unet" else _from_black_forest
        translated = translate(pipe, strange) if strange else {}
    except Exception as error:  # whatever diffusers' converters make of a stranger's keys
        raise ValueError(f"{file.path} has keys that are not kohya's for this model: {first_line(error)}") from error
    if both := known.keys() & translated.keys():
        raise ValueError(f"{file.path} stores a factor under the names of two houses: {shown(both)}")
    return known | translated


def _from_stability(pipe: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers numbers the blocks of a UNet anew, by the UNet's settings; it loses the alphas of attention layers.

    So stand-ins take the tensors' place, and tell which key became which name.
    """
    keys = [key for key in tensors if not key.endswith(".alpha")]
    stand_ins = {key: torch.empty(0) for key in keys}
    sources = {id(stand_in): key for key, stand_in in stand_ins.items()}
    named = type(pipe).lora_state_dict(dict(stand_ins), unet_config=denoiser_of(pipe).config)[0]
    named = convert_unet_state_dict_to_peft({name.removeprefix("unet."): value for name, value in named.items()})
    found = {name: sources[id(stand_in)] for name, stand_in in named.items()}
    if len(found) < len(keys):
        raise ValueError(f"only {len(found)} of {len(keys)} factors have a place in the UNet")
    modules = {key.partition(".")[0]: name.rpartition(".lora_")[0] for name, key in found.items()}
    alphas = {f"{modules[key.partition('.')[0]]}.alpha": tensors[key] for key in tensors if key not in stand_ins}
    return {name: tensors[key] for name, key in found.items()} | alphas


def _from_black_forest(pipe: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers splits the factors that q, k and v share, and multiplies alpha into the factors.

    It drops the alpha of the last layer, so all are multiplied in here, and the rank is what diffusers finds.
    """
    folded = {key: value if key.endswith(".alpha") else value.float() for key, value in tensors.items()}
    for key in [key for key in tensors if key.endswith(".alpha")]:
        stem = key.removesuffix(".alpha")
        rank = len(folded[f"{stem}.lora_down.weight"])
        folded[f"{stem}.lora_up.weight"] = folded[f"{stem}.lora_up.weight"] * (float(tensors[key]) / rank)
        folded[key] = torch.tensor(float(rank))
    named = type(pipe).lora_state_dict(dict(folded))
    named = named[0] if isinstance(named, tuple) else named
    if unknown := [key for key in named if KEY.fullmatch(key)]:
        raise ValueError(f"diffusers has no other name for {shown(unknown)}")
    found = {key.removeprefix("transformer."): value for key, value in named.items()}
    if _outputs(found) != _outputs(folded):  # splitting keeps their number, and diffusers drops some keys in silence
        raise ValueError(f"diffusers finds a place for {_outputs(found)} of {_outputs(folded)} outputs of the layers")
    return found


def _outputs(tensors: Mapping[str, Tensor]) -> int:
    """How many outputs of layers the factors have together: the rows of all that go up."""
    return sum(len(value) for key, value in tensors.items() if key.endswith((".lora_up.weight", ".lora_B.weight")))
