"""SHA-256 of the files that a model, an adapter or a reward came from, as `sha256sum` prints it and the hub shows it.

It takes a second for every GB or two.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from scale.adapters import adapter_file, denoiser_of, settings_file

# the files that diffusers and transformers load where no variant is asked for
WEIGHTS = re.compile(r"(diffusion_pytorch_model|model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)")
# beside those that a tokenizer names itself
TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(files: Iterable[Path | str]) -> list[tuple[str, str | None]]:
    """Of files, each behind its name, which another folder's may have too; None behind an address."""
    return [(file.name, sha256(file)) if isinstance(file, Path) else (file, None) for file in files]


def adapter_hashes(path: Path) -> dict[str, str]:
    """Of an adapter's `weights`, and of PEFT's `settings` beside them, where there are any."""
    settings = settings_file(path)
    return {"weights": sha256(adapter_file(path))} | ({} if settings is None else {"settings": sha256(settings)})


def denoiser_hashes(pipe: Any) -> dict[str, str]:
    """`network_hashes` of the denoiser."""
    return network_hashes(denoiser_of(pipe))


def model_hashes(pipe: Any) -> dict[str, dict[str, str]]:
    """Of every network and tokenizer of a pipeline by its name."""
    networks = {n: network_hashes(part) for n, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    words = {n: part for n, part in pipe.components.items() if isinstance(part, PreTrainedTokenizerBase)}
    return networks | {name: _by_name(tokenizer_files(tokenizer)) for name, tokenizer in words.items()}


def network_hashes(network: Any) -> dict[str, str]:
    """Of a network's `config.json` and weight files by name; none where it came from no folder."""
    came_from = getattr(network.config, "_name_or_path", None)
    if not came_from:
        return {}
    folder = Path(came_from)
    found = [path for path in sorted(folder.glob("*")) if WEIGHTS.fullmatch(path.name)]
    safe = [path for path in found if path.suffix == ".safetensors"]
    return _by_name(path for path in [folder / "config.json", *(safe or found)] if path.is_file())


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> list[Path]:
    """What a tokenizer was read from; nothing where it came from no folder."""
    folder = Path(tokenizer.name_or_path)
    names = {*tokenizer.vocab_files_names.values(), *TOKENIZER} if tokenizer.name_or_path else ()
    return [folder / name for name in sorted(names) if (folder / name).is_file()]


def _by_name(files: Iterable[Path]) -> dict[str, str]:
    return {path.name: sha256(path) for path in files}
