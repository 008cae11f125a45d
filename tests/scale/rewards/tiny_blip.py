"""A tiny random ImageReward in the real one's format, and its forward pass in plain torch, from the raw weights.

Names and order are those of salesforce/BLIP (models/vit.py, models/med.py) and THUDM/ImageReward; no `transformers`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "##s", "square", "and", ","]
HEAD = {0: (1024, None), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}


@dataclass(frozen=True)
class Sizes:
    """Of the ViT, of the BERT, and of the head's input."""

    width: int = 128
    depth: int = 2
    patch: int = 8
    grid: int = 3
    hidden: int = 48
    heads: int = 4
    layers: int = 2
    inner: int = 64
    words: int = len(WORDS) + 2
    positions: int = 40


TINY = Sizes()
REAL = Sizes(1024, 24, 16, 14, 768, 12, 12, 3072, 30524, 512)  # ViT-L/16 at 224 and BERT-base


def shapes(sizes: Sizes = TINY) -> dict[str, tuple[int, ...]]:
    """Every name of an ImageReward checkpoint and its shape."""
    w, h, table = sizes.width, sizes.hidden, {}

    def linear(name: str, out: int, into: int) -> None:
        table[f"{name}.weight"], table[f"{name}.bias"] = (out, into), (out,)

    def norm(name: str, size: int) -> None:
        table[f"{name}.weight"], table[f"{name}.bias"] = (size,), (size,)

    see, say = "blip.visual_encoder", "blip.text_encoder"
    table[f"{see}.cls_token"], table[f"{see}.pos_embed"] = (1, 1, w), (1, sizes.grid**2 + 1, w)
    table[f"{see}.patch_embed.proj.weight"] = (w, 3, sizes.patch, sizes.patch)
    table[f"{see}.patch_embed.proj.bias"] = (w,)
    for i in range(sizes.depth):
        block = f"{see}.blocks.{i}"
        norm(f"{block}.norm1", w)
        linear(f"{block}.attn.qkv", 3 * w, w)
        linear(f"{block}.attn.proj", w, w)
        norm(f"{block}.norm2", w)
        linear(f"{block}.mlp.fc1", 4 * w, w)
        linear(f"{block}.mlp.fc2", w, 4 * w)
    norm(f"{see}.norm", w)
    table[f"{say}.embeddings.position_ids"] = (1, sizes.positions)
    table[f"{say}.embeddings.word_embeddings.weight"] = (sizes.words, h)
    table[f"{say}.embeddings.position_embeddings.weight"] = (sizes.positions, h)
    norm(f"{say}.embeddings.LayerNorm", h)
    for i in range(sizes.layers):
        layer = f"{say}.encoder.layer.{i}"
        for attention, source in (("attention", h), ("crossattention", w)):
            linear(f"{layer}.{attention}.self.query", h, h)
            linear(f"{layer}.{attention}.self.key", h, source)
            linear(f"{layer}.{attention}.self.value", h, source)
            linear(f"{layer}.{attention}.output.dense", h, h)
            norm(f"{layer}.{attention}.output.LayerNorm", h)
        linear(f"{layer}.intermediate.dense", sizes.inner, h)
        linear(f"{layer}.output.dense", h, sizes.inner)
        norm(f"{layer}.output.LayerNorm", h)
    linear("blip.vision_proj", 256, w)  # in the checkpoint, though no reward looks at them
    linear("blip.text_proj", 256, h)
    for i, (out, into) in HEAD.items():
        linear(f"mlp.layers.{i}", out, into or h)
    return table


def random_weights(sizes: Sizes = TINY, seed: int = 0) -> dict[str, Tensor]:
    """Weights large enough that every part moves the score."""
    generator, table = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes(sizes).items():
        if name.endswith("position_ids"):
            table[name] = torch.arange(sizes.positions)[None]
            continue
        noise = torch.randn(shape, generator=generator)
        spread = 1.5 * torch.tensor(shape[1:]).prod() ** -0.5 if len(shape) in (2, 4) else torch.tensor(0.3)
        is_norm = name.endswith("norm.weight") or "LayerNorm.weight" in name or name.endswith(("1.weight", "2.weight"))
        table[name] = 1 + spread * noise if is_norm and len(shape) == 1 else spread * noise
    return table


def settings(sizes: Sizes = TINY) -> dict:
    """med_config.json, with the keys of the original's."""
    return {
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": sizes.hidden,
        "initializer_range": 0.02,
        "intermediate_size": sizes.inner,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": sizes.positions,
        "model_type": "bert",
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": sizes.words,
        "encoder_width": 768,  # the original overwrites it with the ViT's
        "add_cross_attention": True,
    }


def write(folder: Path, weights: dict[str, Tensor], sizes: Sizes = TINY) -> Path:
    """A folder with the three files that ImageReward needs."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(settings(sizes)))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | float = 0.0) -> Tensor:
    """Attention of several heads (n, length, width), with a bias (n, 1, 1, length) on the scores."""
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + bias
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def reward(w: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor, sizes: Sizes = TINY) -> Tensor:
    """ImageReward's score (n,) of preprocessed images and tokens."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    see, say = "blip.visual_encoder", "blip.text_encoder"
    kernel, bias = w[f"{see}.patch_embed.proj.weight"], w[f"{see}.patch_embed.proj.bias"]
    patches = F.conv2d(pixels, kernel, bias, stride=sizes.patch).flatten(2).transpose(1, 2)
    x = torch.cat([w[f"{see}.cls_token"].expand(len(pixels), -1, -1), patches], 1) + w[f"{see}.pos_embed"]
    for i in range(sizes.depth):
        block = f"{see}.blocks.{i}"
        parts = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
        x = x + linear(attend(*parts, heads=sizes.width // 64), f"{block}.attn.proj")
        inner = F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
        x = x + linear(inner, f"{block}.mlp.fc2")
    image = norm(x, f"{see}.norm", 1e-6)

    def ask(x: Tensor, source: Tensor, name: str, bias: Tensor | float) -> Tensor:
        parts = linear(x, f"{name}.self.query"), *(linear(source, f"{name}.self.{part}") for part in ("key", "value"))
        found = linear(attend(*parts, heads=sizes.heads, bias=bias), f"{name}.output.dense")
        return norm(found + x, f"{name}.output.LayerNorm", 1e-12)

    places = w[f"{say}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = w[f"{say}.embeddings.word_embeddings.weight"][ids] + places
    y = norm(y, f"{say}.embeddings.LayerNorm", 1e-12)
    padding = (1 - mask[:, None, None, :].to(y.dtype)) * -10000.0
    for i in range(sizes.layers):
        layer = f"{say}.encoder.layer.{i}"
        y = ask(y, y, f"{layer}.attention", padding)
        y = ask(y, image, f"{layer}.crossattention", 0.0)
        inner = F.gelu(linear(y, f"{layer}.intermediate.dense"))
        y = norm(linear(inner, f"{layer}.output.dense") + y, f"{layer}.output.LayerNorm", 1e-12)
    z = y[:, 0]
    for i in HEAD:
        z = linear(z, f"mlp.layers.{i}")
    return (z[:, 0] - 0.16717362830052426) / 1.0333394966054072
