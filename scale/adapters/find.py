"""Which file of a folder is the adapter."""

from pathlib import Path

FILE_NAMES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")  # diffusers'
PEFT_STEM = "adapter_model"
PEFT_CONFIG = "adapter_config.json"
PEFT_NAMES = (f"{PEFT_STEM}.safetensors", f"{PEFT_STEM}.bin")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def adapter_file(path: Path) -> Path:
    """The adapter file at `path`: the file itself, or the one that a folder holds.

    In a folder diffusers' and PEFT's own names win over all others, and safetensors over pickles.

    Raises:
        ValueError: nothing at `path`; a folder with no adapter, or with several between which only you can choose.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"no adapter at {path}; give a LoRA file or a folder that holds {FILE_NAMES[0]}")
    files = {file.name: file for file in sorted(path.iterdir()) if file.is_file()}
    usual = [[files[name] for name in names if name in files] for names in (FILE_NAMES, PEFT_NAMES)]
    other = [[file for file in files.values() if file.suffix in ends] for ends in ((".safetensors",), PICKLES)]
    candidates = [found[0] for found in usual if found] or next(filter(None, other), [])
    if not candidates:
        names = ", ".join((*FILE_NAMES, *PEFT_NAMES))
        raise ValueError(f"the adapter folder {path} holds none of {names}, nor another adapter; name the file itself")
    if len(candidates) > 1:
        names = ", ".join(file.name for file in candidates[:5])
        raise ValueError(f"the folder {path} holds {len(candidates)} adapters ({names}); name the file itself")
    return candidates[0]


def settings_file(path: Path) -> Path | None:
    """PEFT's settings beside the adapter file at `path`, which act where the file is PEFT's; None without them.

    Raises:
        ValueError: as `adapter_file`.
    """
    settings = adapter_file(path).with_name(PEFT_CONFIG)
    return settings if settings.is_file() else None
