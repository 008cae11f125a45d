"""Tiny random Stable Diffusion and SDXL pipelines, and adapters for them, in the real formats."""

from functools import cache
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from scale.mini import components

LINEAR = ("to_q", "to_v")
MIXED = ("to_k", "to_out.0", "conv1", "conv2")
tokenizer = cache(components.tokenizer)


def sd(seed: int = 0) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline of 16 x 16 pixels."""
    torch.manual_seed(seed)
    pipe = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text()).eval(),
        tokenizer=tokenizer(),
        unet=_unet(cross_attention_dim=16),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """An SDXL pipeline of 16 x 16 pixels: two text encoders, size embeddings."""
    torch.manual_seed(seed)
    pipe = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_text()).eval(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=_unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=_scheduler(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scheduler() -> DDIMScheduler:
    return components.scheduler()


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def _unet(**options) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
        **options,
    ).eval()


def _text() -> CLIPTextConfig:
    tokens = tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=components.PROMPT_TOKENS,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )


def save_lora(
    make: type | object,
    folder: Path,
    seed: int,
    targets: tuple[str, ...] = LINEAR,
    rank: int = 4,
    alpha: int | None = None,
) -> Path:
    """A random LoRA (both factors nonzero) of `make()`'s UNet in diffusers' own safetensors file, in `folder`."""
    pipe: DiffusionPipeline = make()  # pyright: ignore
    torch.manual_seed(1000 + seed)
    pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=list(targets)), adapter_name="a")
    state = get_peft_model_state_dict(pipe.unet, adapter_name="a")
    state = {key: 0.3 * torch.randn_like(value) for key, value in state.items()}
    type(pipe).save_lora_weights(folder, unet_lora_layers=state)
    return folder
