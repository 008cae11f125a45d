"""BLIP's image-grounded text encoder (Li et al. 2022), in `transformers`' modules, from the original's weights."""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from scale.adapters.read import first_line
from scale.rewards.protocol import Images

HEAD_WIDTH = 64  # of both of BLIP's image encoders, ViT-B and ViT-L
# CLIP's, which BLIP and ImageReward kept
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)

RENAMED = (  # the original's names as patterns (models/vit.py and models/med.py of salesforce/BLIP), and transformers'
    (r"^visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"vision.encoder.layers.\1.self_attn."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm", r"vision.encoder.layers.\1.layer_norm"),
    (r"^visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"^text_encoder\.", "text."),
)
POSITIONS = "text_encoder.embeddings.position_ids"  # a buffer 0, 1, 2, ... that the original saves


class ImageGroundedText(nn.Module):
    """A ViT reads the image, a BERT reads the text and looks at the image's patches by cross attention."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig, size: int) -> None:
        super().__init__()
        self.size = size  # of an image's side, in pixels
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)

    def forward(
        self, pixels: Float[Tensor, "n 3 size size"], ids: Int[Tensor, "n length"], mask: Int[Tensor, "n length"]
    ) -> Float[Tensor, "n width"]:
        """Preprocessed images and their tokens -> the last layer's [CLS] token."""
        patches = self.vision(pixels).last_hidden_state
        return self.text(ids, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state[:, 0]


def preprocess(images: Images, size: int) -> Float[Tensor, "n 3 size size"]:
    """Shorter side to `size` (bicubic, antialiased), centre crop, CLIP's mean and deviation; gradients flow.

    It is `Resize, CenterCrop, ToTensor, Normalize` of the original, whose Pillow also rounds to 8 bits.
    """
    shorter = min(images.shape[-2:])
    height, width = (size * side // shorter for side in images.shape[-2:])
    resized = F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = round((height - size) / 2), round((width - size) / 2)
    mean, deviation = images.new_tensor(MEAN).view(3, 1, 1), images.new_tensor(DEVIATION).view(3, 1, 1)
    return (resized[..., top : top + size, left : left + size] - mean) / deviation


def load_encoder(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> ImageGroundedText:
    """The encoder of the original's weights; `settings` (med_config.json) says what their shapes cannot.

    Weights of other parts (`vision_proj`, `text_proj`, momentum copies) are left aside, as the original does.

    Raises:
        ValueError: weights that are missing, too many or of another shape; settings that fit no such model.
    """
    table = {renamed(key): value for key, value in weights.items() if key != POSITIONS}
    table = {key: value for key, value in table.items() if key.startswith(("vision.", "text."))}
    try:
        encoder = _empty(table, settings)
    except KeyError as error:
        raise ValueError(f"the weights or the settings lack {error.args[0]}") from error
    except Exception as error:  # a stranger's shapes and settings make transformers raise anything
        raise ValueError(f"weights or settings that fit no BLIP: {first_line(error)}") from error
    fill(encoder, table)
    positions = torch.arange(encoder.text.config.max_position_embeddings)
    encoder.text.embeddings.register_buffer("position_ids", positions[None], persistent=False)
    return encoder


def renamed(key: str) -> str:
    """transformers' name of a weight of the original."""
    for pattern, name in RENAMED:
        if re.match(pattern, key):
            return re.sub(pattern, name, key)
    return key


def fill(module: nn.Module, table: Mapping[str, Tensor]) -> None:
    """Let the tensors (as float32) be the weights of a module on the meta device; ValueError unless they fit."""
    try:
        missing, surplus = module.load_state_dict({k: v.float() for k, v in table.items()}, strict=False, assign=True)
    except RuntimeError as error:
        raise ValueError(f"weights of another shape: {str(error).splitlines()[-1].strip()}") from error
    if missing or surplus:
        what, keys = ("lack", missing) if missing else ("have too many:", surplus)
        raise ValueError(f"the weights {what} {keys[0]}" + f" and {len(keys) - 1} more" * (len(keys) > 1))


def _empty(table: Mapping[str, Tensor], settings: Mapping[str, Any]) -> ImageGroundedText:
    """The encoder on the meta device. Sizes are the weights' own, so no settings can ask for memory they have not."""
    width, _, patch, _ = table["vision.embeddings.patch_embedding.weight"].shape
    grid = round((table["vision.embeddings.position_embedding"].shape[1] - 1) ** 0.5)
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=table["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_count(table, r"vision\.encoder\.layers\.(\d+)\."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=grid * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,  # transformers' default is ten times it
    )
    words, hidden = table["text.embeddings.word_embeddings.weight"].shape
    text = BlipTextConfig(
        vocab_size=words,
        hidden_size=hidden,
        encoder_hidden_size=width,
        intermediate_size=table["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_count(table, r"text\.encoder\.layer\.(\d+)\."),
        num_attention_heads=settings["num_attention_heads"],
        max_position_embeddings=table["text.embeddings.position_embeddings.weight"].shape[0],
        hidden_act=settings["hidden_act"],
        layer_norm_eps=settings["layer_norm_eps"],
        is_decoder=True,  # transformers' word for "has cross attention"
        bos_token_id=None,
        eos_token_id=None,
        sep_token_id=None,
    )
    with torch.device("meta"):
        return ImageGroundedText(vision, text, grid * patch)


def _count(table: Mapping[str, Tensor], pattern: str) -> int:
    return len({found[1] for key in table if (found := re.match(pattern, key))})
