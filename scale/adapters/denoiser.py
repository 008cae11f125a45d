"""The part of a pipeline that adapters change."""

from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import unwrap_module
from peft.tuners.lora import LoraLayer
from torch import nn

DENOISERS = ("unet", "transformer")  # what pipelines call them


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """Either "unet" or "transformer", whichever the pipeline has; ValueError for neither."""
    for name in DENOISERS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer to put adapters on")


def denoiser_of(pipe: DiffusionPipeline) -> Any:
    """The pipeline's UNet or transformer, without the wrapper that `torch.compile` puts around it."""
    return unwrap_module(getattr(pipe, denoiser_name(pipe)))


def lora_layers(denoiser: nn.Module) -> list[Any]:
    """Every LoRA layer of a denoiser, in the order of its modules."""
    return [module for module in denoiser.modules() if isinstance(module, LoraLayer)]


def plain_layers(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Every module of a denoiser by its name, as if no adapter had wrapped it: the layers below the wrappers."""
    modules = {name: module for name, module in denoiser.named_modules() if ".lora_" not in name}
    return {name.replace(".base_layer", ""): module for name, module in modules.items()}  # the base comes last
