"""Adapter files as tables of tensors, without running anything that is in them."""

import json
import pickle
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from scale.adapters.find import PEFT_CONFIG, PEFT_STEM

PEFT_PREFIX = "base_model.model."
LARGEST_CONFIG = 10_000_000  # bytes
LONGEST_KEY = 500
MOST_SHARED = 4  # bytes of tensors a byte of the file: honest pickles share a factor among q, k and v


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds: tensors by key, and the settings (of peft's LoraConfig) that came with them."""

    path: Path
    tensors: dict[str, Tensor]
    settings: dict[str, Any]


def read(path: Path) -> AdapterFile:
    """A `.safetensors` file with its header, or a pickle of tensors; PEFT's `adapter_config.json` if it is beside.

    Raises:
        ValueError: a file that cannot be read; a pickle that asks for code; a table that holds anything but plain
            tensors, together about as large as the file; settings that are no JSON object.
    """
    content, header = open_file(path)
    tensors = tensors_of(content, path)
    config = path.with_name(PEFT_CONFIG)
    if config.is_file() and (path.stem == PEFT_STEM or any(key.startswith(PEFT_PREFIX) for key in tensors)):
        return AdapterFile(path, tensors, _settings(short_text(config, LARGEST_CONFIG), config))
    return AdapterFile(path, tensors, _settings(header or "{}", path))


def first_line(error: Exception) -> str:
    """What an error says, short enough for the line of another error."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


def open_file(path: Path) -> tuple[object, str | None]:
    """What a file holds, and the LoRA settings (JSON) that diffusers writes into a safetensors header."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
        # a safetensors file begins with the length of its header, 8 bytes, and the header with a brace
        if path.suffix == ".safetensors" or start[8:] == b"{":
            with safe_open(path, framework="pt") as opened:
                weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
                return weights, (opened.metadata() or {}).get("lora_adapter_metadata")
        if _is_compressed(path):
            raise ValueError("it is compressed, as torch saves nothing, and may grow a thousandfold; save it again")
        with warnings.catch_warnings(action="ignore"):  # torch's doubts about a pickle that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True), None
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is no pickle of tensors alone, and another could run code; "
            "ask for a .safetensors file"
        ) from error
    except Exception as error:  # a hostile file can make a parser raise anything
        raise ValueError(f"{path} is no readable file of weights: {first_line(error)}") from error


def _is_compressed(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())


def tensors_of(weights: object, path: Path) -> dict[str, Tensor]:
    """A table of named, ordinary tensors, in which nothing claims more memory than its bytes in the file."""
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise ValueError(f"{path} holds no table of tensors, so it is no file of weights")
    if any(len(key) > LONGEST_KEY for key in weights):
        raise ValueError(f"{path} has a key of more than {LONGEST_KEY} letters, so it is no file of weights")
    if not all(type(value) in (Tensor, nn.Parameter) for value in weights.values()):
        raise ValueError(f"{path} holds no table of tensors, so it is no file of weights")
    for key, value in weights.items():
        plain = value.layout is torch.strided and value.device.type == "cpu"
        if not plain or value.is_quantized or value.is_nested:
            raise ValueError(f"{path} stores {key} as no plain tensor; save it as a dense one")
    # tensors of a pickle may share or repeat their bytes: a terabyte of zeros can be four bytes on disk
    claimed, size = sum(value.numel() * value.element_size() for value in weights.values()), path.stat().st_size
    if claimed > MOST_SHARED * size:
        raise ValueError(f"{path} has {size} bytes but claims {claimed} of tensors; save each tensor whole")
    return weights


def short_text(path: Path, largest: int) -> str:
    """A stranger's text file, of at most `largest` bytes; ValueError for a larger one, and for what is not UTF-8."""
    with path.open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"{path} is larger than {largest} bytes, so it is not read; shorten or remove it")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8, so it cannot be read; save it again, or remove it") from error


def _settings(text: str, source: Path) -> dict[str, Any]:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} has LoRA settings that cannot be read: {first_line(error)}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{source} has LoRA settings that cannot be read: no table of names and values")
    return given


def shown(keys: Iterable[str]) -> str:
    """The first few keys, for an error message."""
    return ", ".join(key[:100] for key in list(keys)[:3]) or "none"
