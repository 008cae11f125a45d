"""Adapter files of strangers: found, read, checked, and put on a pipeline's denoiser as peft adapters."""

from scale.adapters.card import stated_variances, step_variance
from scale.adapters.denoiser import denoiser_name, denoiser_of, lora_layers
from scale.adapters.find import FILE_NAMES, adapter_file, settings_file
from scale.adapters.load import load_adapter

__all__ = [
    "FILE_NAMES",
    "adapter_file",
    "denoiser_name",
    "denoiser_of",
    "load_adapter",
    "lora_layers",
    "settings_file",
    "stated_variances",
    "step_variance",
]
