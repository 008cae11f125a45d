"""HPSv2: which image people would prefer for a prompt (Wu et al. 2023, "Human Preference Score v2")."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from scale.adapters.read import open_file, tensors_of
from scale.rewards.clip import CLIP_H, CONFIG, PREPROCESSOR, WORDS, Clip, find, load_clip, remedy, resize_and_pad
from scale.rewards.protocol import Images, Scorer, Scores

HUB_ID = "xswu/HPSv2"
VERSIONS = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
RENAMED = (  # open_clip's names as patterns, and transformers'
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # so spelt
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"(layers\.\d+)\.ln_([12])\.", r"\1.layer_norm\2."),
    (r"(layers\.\d+)\.mlp\.c_fc\.", r"\1.mlp.fc1."),
    (r"(layers\.\d+)\.mlp\.c_proj\.", r"\1.mlp.fc2."),
    (r"(layers\.\d+)\.attn\.", r"\1.self_attn."),
)
PROJECTIONS = ("visual_projection.weight", "text_projection.weight")


class HPSv2(Scorer):
    """`cos(image, prompt)` of CLIP ViT-H as fine-tuned on people's choices; the paper's tables show it times 100.

    `model` is a folder with the checkpoint of that `version` ("v2.0" is the paper's) beside the files of CLIP ViT-H
    that say how to use it, or with the weights in transformers' format. The whole image is seen, on black where it is
    not square.

    Raises:
        ValueError: a version that is none; a file that is missing, unreadable, refused, or does not fit the others.
    """

    name = "hpsv2"
    range = (-1.0, 1.0)
    differentiable = True

    def __init__(self, model: str | Path = HUB_ID, *, version: str = "v2.1") -> None:
        if version not in VERSIONS:
            raise ValueError(f"no version {version!r} of hpsv2; choose one of {', '.join(VERSIONS)}")
        how = (
            f"`hf download {HUB_ID} {VERSIONS[version]} --local-dir FOLDER` and "
            f"`hf download {CLIP_H} {CONFIG} {WORDS} {PREPROCESSOR} --local-dir FOLDER` bring all it needs; "
            "then pass model=FOLDER"
        )
        with remedy(self.name, model, how):
            self.clip = _load(model, VERSIONS[version])
        self.files = self.clip.files

    def _score(self, images: Images, prompts: Sequence[str]) -> Scores:
        return self.clip.cosines(images, prompts)


def _load(model: str | Path, checkpoint: str) -> Clip:
    folder = Path(model).expanduser()
    # another version's checkpoint beside plain CLIP's weights must not make these pass for HPSv2
    if str(model) == HUB_ID or any((folder / name).is_file() for name in VERSIONS.values()):
        path = find((checkpoint,), model)
        weights = to_transformers(read_checkpoint(path))
        return load_clip(model, CLIP_H, weights=weights, weights_file=path, fit=resize_and_pad)
    return load_clip(model, CLIP_H, fit=resize_and_pad)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of open_clip's checkpoint, which may lie under "state_dict" and have been trained on many GPUs.

    Raises:
        ValueError: a pickle that asks for code, or no table of tensors.
    """
    content = open_file(path)[0]
    table = tensors_of(content.get("state_dict", content) if isinstance(content, dict) else content, path)
    return {key.removeprefix("module."): value for key, value in table.items()}


def to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of open_clip's `CLIP` under transformers' names: queries, keys and values apart.

    Raises:
        ValueError: a weight of a shape that cannot be one.
    """
    table: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = _renamed(key)
        if value.ndim < 1 + (name in PROJECTIONS) and name != "logit_scale":
            raise ValueError(f"{key} has the shape {tuple(value.shape)}, which is no such weight's")
        if ".in_proj_" in name:
            before, part = name.split("in_proj_")
            table |= {f"{before}{q}_proj.{part}": each for q, each in zip("qkv", value.chunk(3), strict=True)}
        else:
            table[name] = value.mT if name in PROJECTIONS else value
    return table


def _renamed(key: str) -> str:
    for pattern, name in RENAMED:
        key = re.sub(pattern, name, key)
    return key
