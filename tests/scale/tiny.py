"""Tiny random pipelines of every family, 16 x 16 pixels, and adapters for them, in the real formats. All offline."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (diffusers annotates tuples of any length as tuples of one, and neither None nor schedulers where it takes them)

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from scale.adapters import denoiser_name
from scale.mini import components

LINEAR = ("to_q", "to_v")
MIXED = ("to_k", "to_out.0", "conv1", "conv2")
# the layers of an MMDiT: of the picture's stream, the text's, and Flux's joint one
MMDIT = ("to_k", "add_q_proj", "ff.net.0.proj", "ff_context.net.2", "proj_mlp")
WIDTH, T5_WIDTH = 16, 32
tokenizer = cache(components.tokenizer)
Pipe = TypeVar("Pipe", bound=Any)


def sd(seed: int = 0, channels: int = 4) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline; its UNet takes `channels`."""
    torch.manual_seed(seed)
    pipe = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text()).eval(),
        tokenizer=tokenizer(),
        unet=_unet(cross_attention_dim=WIDTH, in_channels=channels, out_channels=4),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _quiet(pipe)


def v_prediction(seed: int = 0) -> StableDiffusionPipeline:
    """`sd` whose UNet predicts v, as Stable Diffusion 2 does."""
    pipe = sd(seed)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return pipe


def img2img(seed: int = 0) -> StableDiffusionImg2ImgPipeline:
    """`sd` that starts from a picture."""
    return _quiet(StableDiffusionImg2ImgPipeline(**sd(seed).components, requires_safety_checker=False))


def inpaint(seed: int = 0, channels: int = 4) -> StableDiffusionInpaintPipeline:
    """`sd` that paints in a mask: with 9 channels the UNet sees mask and masked picture, with 4 the pipeline pastes."""
    return _quiet(StableDiffusionInpaintPipeline(**sd(seed, channels).components, requires_safety_checker=False))


def sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """An SDXL pipeline: two text encoders, size embeddings."""
    torch.manual_seed(seed)
    pipe = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_text()).eval(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=_unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
        scheduler=_scheduler(),
        add_watermarker=False,
    )
    return _quiet(pipe)


def sd3(seed: int = 0, t5: bool = True) -> StableDiffusion3Pipeline:
    """An SD3.5 pipeline (its first block has a second attention), with or without the T5 encoder."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.1),
        text_encoder=CLIPTextModelWithProjection(_text()).eval(),
        tokenizer=tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_text()).eval(),
        tokenizer_2=tokenizer(),
        text_encoder_3=_t5() if t5 else None,
        tokenizer_3=_t5_tokenizer() if t5 else None,
    )
    return _quiet(pipe)


def flux(seed: int = 0, guidance_embeds: bool = True) -> FluxPipeline:
    """A Flux pipeline: guidance is an input of the denoiser (dev), or there is none (schnell)."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    pipe = FluxPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(shift_factor=0.1),
        text_encoder=CLIPTextModel(_text()).eval(),
        tokenizer=tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=_t5_tokenizer(),
    )
    pipe.default_sample_size = 8  # Flux's own default is 1024 pixels, whatever its transformer
    return _quiet(pipe)


def _quiet(pipe: Pipe) -> Pipe:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scheduler() -> DDIMScheduler:
    return components.scheduler()


def _vae(**options) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **options,
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
        hidden_size=WIDTH,
        intermediate_size=16,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=components.PROMPT_TOKENS,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )


def _t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(_t5_tokenizer()), d_model=T5_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )  # fmt: skip
    return T5EncoderModel(config).eval()


@cache
def _t5_tokenizer() -> T5Tokenizer:
    """T5's unigrams over single letters: any lower-case prompt tokenizes."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, *((letter, -2.0) for letter in letters)], extra_ids=0)


def save_lora(
    make: Any,
    folder: Path,
    seed: int,
    targets: tuple[str, ...] = LINEAR,
    rank: int = 4,
    alpha: int | None = None,
    ranks: Mapping[str, int] = MappingProxyType({}),
) -> Path:
    """A random LoRA (both factors nonzero) of `make()`'s denoiser in diffusers' own safetensors file, in `folder`.

    `ranks` gives some of the targets a rank of their own; a given `alpha` is for all, and in the file's header.
    """
    pipe = make()
    component = denoiser_name(pipe)
    denoiser = getattr(pipe, component)
    torch.manual_seed(1000 + seed)
    config = LoraConfig(r=rank, target_modules=list(targets), rank_pattern=dict(ranks))
    denoiser.add_adapter(config, adapter_name="a")
    state = get_peft_model_state_dict(denoiser, adapter_name="a")
    parts = {f"{component}_lora_layers": {key: 0.3 * torch.randn_like(value) for key, value in state.items()}}
    if alpha is not None:
        settings = {"r": rank, "lora_alpha": alpha, "target_modules": list(targets), "rank_pattern": dict(ranks)}
        parts[f"{component}_lora_adapter_metadata"] = settings
    type(pipe).save_lora_weights(folder, **parts)
    return folder
