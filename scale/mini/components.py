"""The parts of the small world's Stable Diffusion model, untrained, in diffusers' and transformers' own classes."""

# pyright: reportArgumentType=false
# (diffusers annotates tuples of any length as tuples of one, and leaves schedulers out of its own union)

import json

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from scale.mini import world

PROMPT_TOKENS = 16
TEXT_WIDTH = 64
LATENT_SIZE, LATENT_CHANNELS = 16, 4


def tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE, its merges learnt on the words of the small world (any other text still tokenizes)."""
    words = ["a", "an", "and", "colored", *world.COLOURS, *world.SHAPES]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=10_000,
            min_frequency=1,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    learnt = set(bpe.get_vocab()) | set(alphabet) | {symbol + "</w>" for symbol in alphabet}
    merges = [tuple(merge) for merge in _merges(bpe)]
    # CLIP keeps the end of text as the highest id, where its text model looks for the pooled state.
    vocabulary = {token: i for i, token in enumerate([*sorted(learnt), "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROMPT_TOKENS)


def _merges(bpe: Tokenizer) -> list[list[str]]:
    return json.loads(bpe.to_str())["model"]["merges"]


def text_encoder(tokens: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text model of width 64."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=PROMPT_TOKENS,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )
    )


def autoencoder() -> AutoencoderKL:
    """An f = 4 autoencoder with four latent channels, 0.23 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=world.SIZE,
    )


def denoiser() -> UNet2DConditionModel:
    """A two-level conditional UNet, cross attention at 8 x 8 (at 16 x 16 it doubles the time), 3.9 M parameters."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's own noise schedule and sampler settings."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def pipeline(
    vae: AutoencoderKL, text: CLIPTextModel, tokens: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The parts as one StableDiffusionPipeline without a safety checker."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokens,
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
