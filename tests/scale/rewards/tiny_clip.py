"""CLIP of random weights in the files of the real ones, and open_clip's layout of it, written out in plain torch."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from scale.mini.components import tokenizer

SIZE, PATCH, WIDTH, HEADS, LAYERS, LENGTH, SHARED = 32, 8, 32, 2, 2, 16, 24
MEAN, DEVIATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PROMPTS = ["a red colored circle", "a blue square", "an orange ring and a white star"]


def pictures(n: int = 3, height: int = 48, width: int = 48, seed: int = 1) -> Tensor:
    """Random pictures (n, 3, height, width) of 8 bits in [0, 1], as much detail in every octave as nature's have."""
    generator, total = torch.Generator().manual_seed(seed), torch.zeros(n, 3, height, width)
    for octave in range(max(height, width).bit_length()):
        grid = torch.rand(n, 3, 1 + 2**octave, 1 + 2**octave, generator=generator) - 0.5
        total += F.interpolate(grid, (height, width), mode="bicubic")
    return (255 * (0.5 + 0.25 * total).clamp(0, 1)).round() / 255


def config(act: str = "gelu") -> dict:
    """`config.json`, with the ids that the real ones have: 2 stands for "the largest of the prompt"."""
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS, "hidden_act": act}
    tower |= {"num_attention_heads": HEADS, "projection_dim": SHARED}
    words = {"vocab_size": len(tokenizer()), "max_position_embeddings": LENGTH, "eos_token_id": 2, "bos_token_id": 0}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": SHARED,
        "text_config": tower | words,
        "vision_config": tower | {"image_size": SIZE, "patch_size": PATCH},
    }


def write_settings(folder: Path, act: str = "gelu", *, old: bool = False) -> Path:
    """All but the weights; `old` writes sizes as the numbers that OpenAI's files have."""
    crop, edge = {"height": SIZE, "width": SIZE}, {"shortest_edge": SIZE}
    steps = {"do_resize": True, "do_center_crop": True, "do_normalize": True, "resample": 3}
    sizes = {"size": SIZE if old else edge, "crop_size": SIZE if old else crop}
    settings = steps | sizes | {"image_mean": MEAN, "image_std": DEVIATION}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(config(act)))
    tokenizer().save_pretrained(folder)
    return folder


def model(act: str = "gelu", seed: int = 0) -> CLIPModel:
    """Weights of a few times the usual size, so that pictures and prompts make a difference."""
    torch.manual_seed(seed)
    clip = CLIPModel(CLIPConfig.from_dict(config(act))).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        clip.logit_scale.fill_(4.6052)  # 100, where the real ones end
    return clip


def features(tokenizer: CLIPTokenizer, pixels: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """`model()`'s embeddings, not normalised, of preprocessed images and of prompts, one prompt at a time."""
    clip: Any = model().requires_grad_(False)
    tokens = [tokenizer(prompt, truncation=True, max_length=LENGTH, return_tensors="pt") for prompt in prompts]
    read = torch.cat([clip.get_text_features(**each).pooler_output for each in tokens])
    return clip.get_image_features(pixel_values=pixels).pooler_output, read


def write(folder: Path, act: str = "gelu", *, half: bool = False, old: bool = False) -> Path:
    """A whole folder: safetensors, or (old) the pickle with the position buffers that older files hold."""
    table = {key: value.half() if half else value for key, value in model(act).state_dict().items()}
    if old:
        table["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
        torch.save(table, folder / "pytorch_model.bin")
    else:
        save_file(table, folder / "model.safetensors", metadata={"format": "pt"})
    return write_settings(folder, act, old=old)


class Block(nn.Module):
    """A residual block with the names of open_clip's."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


def blocks() -> nn.ModuleDict:
    return nn.ModuleDict({"resblocks": nn.ModuleList(Block() for _ in range(LAYERS))})


class Tower(nn.Module):
    """open_clip's `VisionTransformer`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(1 + (SIZE // PATCH) ** 2, WIDTH))
        self.ln_pre, self.ln_post, self.transformer = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), blocks()
        self.proj = nn.Parameter(torch.randn(WIDTH, SHARED))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer["resblocks"]:  # pyright: ignore[reportGeneralTypeIssues]
            x = block(x, None)
        return self.ln_post(x[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """open_clip's `CLIP`: the weights' names and the forward pass, independent of transformers."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.visual, self.transformer, self.ln_final = Tower(), blocks(), nn.LayerNorm(WIDTH)
        self.token_embedding = nn.Embedding(len(tokenizer()), WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.text_projection = nn.Parameter(torch.randn(WIDTH, SHARED))
        self.logit_scale = nn.Parameter(torch.tensor(4.6052))
        with torch.no_grad():
            for parameter in self.parameters():  # biases and gains too
                parameter.add_(0.1 * torch.randn_like(parameter))
        self.eval().requires_grad_(False)

    def prompts(self, ids: Tensor) -> Tensor:
        """Ids (n, LENGTH), zeros behind the end of text, which has the largest id."""
        mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding
        for block in self.transformer["resblocks"]:  # pyright: ignore[reportGeneralTypeIssues]
            x = block(x, mask)
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection
