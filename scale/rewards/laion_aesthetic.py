"""LAION's aesthetic score (Schuhmann 2022, the "improved aesthetic predictor"), from 1 to 10 on its training data."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from scale.adapters.read import read
from scale.rewards.clip import find, load_clip, remedy
from scale.rewards.protocol import Images, Scorer, Scores, device

HUB_ID = "openai/clip-vit-large-patch14"
HEAD_ID = "trl-lib/ddpo-aesthetic-predictor"
HEADS = tuple(
    f"{stem}{end}" for stem in ("sac+logos+ava1-l14-linearMSE", "aesthetic-model") for end in (".safetensors", ".pth")
)
LINEAR = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")  # drop-outs have the numbers between
REMEDY = (
    f"`hf download {HUB_ID} --local-dir FOLDER` and `hf download {HEAD_ID} aesthetic-model.pth --local-dir FOLDER` "
    "bring all it needs; then pass model=FOLDER"
)


class LaionAesthetic(Scorer):
    """`w . e + b` of CLIP ViT-L/14's image embedding e, which has length 1; the prompts play no part.

    The head is a network 768-1024-128-64-16-1 without activations, so it is one affine map. Its file
    (`sac+logos+ava1-l14-linearMSE.pth`, or that of the hub, `aesthetic-model.pth`) lies in `model` beside CLIP's.

    Raises:
        ValueError: a file that is missing, unreadable, refused, or does not fit the others.
    """

    name = "laion-aesthetic"
    differentiable = True

    def __init__(self, model: str | Path = HUB_ID) -> None:
        with remedy(self.name, model, REMEDY):
            self.clip = load_clip(model)
            head = find(HEADS, model, HEAD_ID)
            weight, bias = affine(read(head).tensors, self.clip.model.config.projection_dim)
        self.files = (*self.clip.files, head)
        self.weight, self.bias = weight.float().to(device()), bias.float().to(device())
        length = weight.norm().item()
        self.range = (bias.item() - length, bias.item() + length)

    def _score(self, images: Images, prompts: Sequence[str]) -> Scores:
        return self.clip.images(images) @ self.weight + self.bias


def affine(layers: Mapping[str, Tensor], width: int) -> tuple[Float[Tensor, " width"], Float[Tensor, ""]]:
    """The linear layers after one another, as one map (weight, bias) in float64.

    Raises:
        ValueError: other layers than the predictor's, or layers that do not follow one another from `width` to 1.
    """
    if set(layers) != {f"{name}.{part}" for name in LINEAR for part in ("weight", "bias")}:
        raise ValueError(
            f"the head must have the weights and biases of {', '.join(LINEAR)}, received {len(layers)} others"
        )
    weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    try:
        for name in LINEAR:
            layer = layers[f"{name}.weight"].double()
            weight, bias = layer @ weight, layer @ bias + layers[f"{name}.bias"].double()
        return weight.reshape(width), bias.reshape(())
    except RuntimeError as error:
        raise ValueError(f"the head is not one from embeddings of width {width} to a score: {error}") from error
