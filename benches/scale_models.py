"""The denoisers that the benches of `scale` run: real architectures with random weights, in diffusers' own pipelines.

How long a step takes does not depend on what the weights are. The configurations are those of
`stable-diffusion-v1-5/stable-diffusion-v1-5` (once runwayml's) and `stabilityai/stable-diffusion-xl-base-1.0`, so that
nothing is downloaded. Text encoders and VAEs run once an image, outside the blend, and are left out.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TOKENS = 77
# both models were trained with these betas
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@dataclass(frozen=True)
class Architecture:
    """A denoiser and the pipeline around it; `latents` is the side of the latents it was trained on."""

    pipeline: Any
    unet: Mapping[str, Any]
    latents: int
    pooled: int | None = None
    scheduler: Any = field(default=lambda: DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False))

    @property
    def divisor(self) -> int:
        """What a side of the latents must be a multiple of, for every level halves it."""
        return 2 ** (len(self.unet["block_out_channels"]) - 1)


SD15 = Architecture(
    StableDiffusionPipeline,
    {
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": (320, 640, 1280, 1280),
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    },
    latents=64,
)

SDXL = Architecture(
    StableDiffusionXLPipeline,
    {
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": 256,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "center_input_sample": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "only_cross_attention": False,
        "out_channels": 4,
        "projection_class_embeddings_input_dim": 2816,
        "resnet_time_scale_shift": "default",
        "sample_size": 128,
        "time_embedding_type": "positional",
        "transformer_layers_per_block": (1, 2, 10),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
    },
    latents=128,
    pooled=1280,
    scheduler=lambda: EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
)

TINY = Architecture(
    StableDiffusionPipeline,
    {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
    },
    latents=8,
)

ARCHITECTURES = {"sd15": SD15, "sdxl": SDXL, "tiny": TINY}


def skeleton(model: str) -> UNet2DConditionModel:
    """The denoiser on the meta device: shapes without memory, in eval mode."""
    with torch.device("meta"):
        return UNet2DConditionModel(**ARCHITECTURES[model].unet).eval().requires_grad_(False)


def random_unet(model: str, dtype: torch.dtype, device: str, seed: int = 0) -> UNet2DConditionModel:
    """The denoiser in memory, with weights that keep activations of the order of one.

    They are cut from one pool of normals whose length is prime, as drawing billions of them would take minutes.
    """
    unet = skeleton(model)
    nn.Module.to(unet, dtype)  # diffusers' own warns of layers to keep in float32, of which these have none
    unet.to_empty(device=device)
    pool = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    for module in unet.modules():
        norm = isinstance(module, nn.GroupNorm | nn.LayerNorm)
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                _fill(parameter.data, pool)
            else:
                parameter.data.fill_(float(norm and parameter is module.weight))
    return unet


def _fill(weight: Tensor, pool: Tensor) -> None:
    scaled = pool * weight[0].numel() ** -0.5
    for piece in weight.view(-1).split(len(pool)):
        piece.copy_(scaled[: len(piece)])


def room_for(model: str, dtype: torch.dtype, device: str) -> int:
    """How many whole denoisers fit into the free memory, with a quarter of it left for everything else."""
    size = sum(parameter.numel() for parameter in skeleton(model).parameters()) * dtype.itemsize
    if device != "cpu":
        free = torch.cuda.mem_get_info()[0]
    else:
        meminfo = Path("/proc/meminfo")  # Linux; elsewhere nobody knows, and one is assumed to fit
        lines = meminfo.read_text().splitlines() if meminfo.exists() else []
        free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 2 * size)
    return int(free * 3 / 4 // size)


def sharing(model: str, unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Another denoiser with the same weights in the same memory, so that each contestant has its own adapters."""
    twin = skeleton(model)
    twin.load_state_dict(unet.state_dict(), assign=True)
    return twin.requires_grad_(False)


def pipeline(model: str, unet: UNet2DConditionModel) -> Any:
    """diffusers' own pipeline around the denoiser alone; it takes embeddings and returns latents."""
    architecture = ARCHITECTURES[model]
    parts: dict[str, Any] = {"vae": None, "text_encoder": None, "tokenizer": None}
    if architecture.pooled is None:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    else:
        parts |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
    pipe = architecture.pipeline(unet=unet, scheduler=architecture.scheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(model: str, unet: UNet2DConditionModel, batch: int, latents: int, seed: int = 0) -> dict[str, Any]:
    """Arguments of one call of the pipeline: random embeddings of `batch` prompts, and their initial latents."""
    architecture, generator = ARCHITECTURES[model], torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(unet.device, unet.dtype)

    width = architecture.unet["cross_attention_dim"]
    call: dict[str, Any] = {f"{sign}prompt_embeds": normal(batch, TOKENS, width) for sign in ("", "negative_")}
    if architecture.pooled is not None:
        call |= {f"{sign}pooled_prompt_embeds": normal(batch, architecture.pooled) for sign in ("", "negative_")}
    return call | {"latents": normal(batch, 4, latents, latents), "height": 8 * latents, "width": 8 * latents}


def load(pipe: Any, path: Path, name: str) -> None:
    """What a user of plain diffusers calls, without peft's warning that a second adapter is not the first."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        pipe.load_lora_weights(path, adapter_name=name)


def save_adapters(model: str, folder: Path, count: int, rank: int) -> dict[str, Path]:
    """Random LoRAs on the attention's projections as diffusers' own safetensors files: `a0`, `a1`, ... by folder.

    Both factors are nonzero, and small, so that the blend of random models stays finite.
    """
    layers = {
        name: module
        for name, module in skeleton(model).named_modules()
        if isinstance(module, nn.Linear) and name.endswith(ATTENTION)
    }
    paths = {f"a{k}": folder / f"a{k}" for k in range(count)}
    for k, path in enumerate(paths.values()):
        generator = torch.Generator().manual_seed(1000 + k)
        state = {}
        for name, layer in layers.items():
            down, up = (rank, layer.in_features), (layer.out_features, rank)
            state[f"{name}.lora_A.weight"] = torch.randn(down, generator=generator) * layer.in_features**-0.5
            state[f"{name}.lora_B.weight"] = torch.randn(up, generator=generator) * 0.05
        ARCHITECTURES[model].pipeline.save_lora_weights(path, unet_lora_layers=state)
    return paths
