"""A frozen CLIP (Radford et al. 2021) that rewards look through: its files, its preprocessing, its embeddings."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from scale.adapters.read import first_line, read, short_text
from scale.hashes import tokenizer_files
from scale.rewards.protocol import Images, Scores, device

CONFIG, WORDS, PREPROCESSOR = "config.json", "tokenizer.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # PickScore and HPSv2 are fine-tuned from it
LARGEST_TEXT = 10_000_000  # bytes
BICUBIC = 3  # Pillow's number
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")

Embeddings = Float[Tensor, "n shared"]
Square = Float[Tensor, "n 3 size size"]
Fit = Callable[[Images, int], Square]


def resize_and_crop(images: Images, size: int) -> Square:
    """The shorter side to `size` (bicubic, antialiased), then the centre `(n, 3, size, size)`: CLIP's own way.

    Clamped to [0, 1], as Pillow does; Pillow also rounds to 8 bits, which would stop the gradient.
    """
    height, width = images.shape[-2:]
    shorter = min(height, width)
    resized = _resize(images, (size * height // shorter, size * width // shorter)).clamp(0, 1)
    top, left = ((side - size) // 2 for side in resized.shape[-2:])
    return resized[..., top : top + size, left : left + size]


def resize_and_pad(images: Images, size: int) -> Square:
    """The longer side to `size` (bicubic, antialiased), the whole image on a black `(n, 3, size, size)`: HPSv2's way.

    Not clamped: HPSv2 resizes tensors of floats, whose overshoot at edges stays (`ResizeMaxSize` of its open_clip).
    """
    longer = max(images.shape[-2:])
    height, width = (max(1, round(side * size / longer)) for side in images.shape[-2:])
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(_resize(images, (height, width)), (left, size - width - left, top, size - height - top))


def _resize(images: Images, shape: tuple[int, int]) -> Tensor:
    if images.shape[-2:] == shape:
        return images
    return F.interpolate(images, shape, mode="bicubic", antialias=True)


@dataclass(frozen=True)
class Preprocessing:
    """Images of any size in [0, 1] -> `(n, 3, size, size)` of mean 0 and deviation 1 a channel; gradients flow."""

    size: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    fit: Fit = resize_and_crop

    def __call__(self, images: Images) -> Square:
        mean, deviation = (images.new_tensor(each).view(3, 1, 1) for each in (self.mean, self.deviation))
        return (self.fit(images, self.size) - mean) / deviation


class Clip:
    """Images and prompts as embeddings of length 1; frozen, in float32, on the GPU if there is one."""

    def __init__(
        self, model: CLIPModel, tokenizer: CLIPTokenizer, preprocess: Preprocessing, files: Sequence[Path] = ()
    ) -> None:
        self.model: Any = model.eval().requires_grad_(False)  # transformers' own annotations allow nearly anything
        self.model.to(device())
        self.tokenizer, self.preprocess, self.files = tokenizer, preprocess, tuple(files)
        self.length: int = self.model.config.text_config.max_position_embeddings

    def images(self, images: Images) -> Embeddings:
        """Images (n, 3, H, W) in [0, 1] -> (n, shared)."""
        seen = self.model.get_image_features(pixel_values=self.preprocess(images))
        return F.normalize(seen.pooler_output, dim=-1)

    def prompts(self, prompts: Sequence[str]) -> Embeddings:
        """Prompts, cut at the model's length (77 tokens) -> (n, shared); a repeated prompt is read once."""
        different = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(different, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        understood = self.model.get_text_features(**tokens.to(self.model.device))
        rows = [different.index(prompt) for prompt in prompts]
        return F.normalize(understood.pooler_output, dim=-1)[rows]

    def cosines(self, images: Images, prompts: Sequence[str]) -> Scores:
        """The cosine between each image and its own prompt (n,), in [-1, 1]."""
        return (self.images(images) * self.prompts(prompts)).sum(-1)


def load_clip(
    model: str | Path,
    *others: str,
    weights: Mapping[str, Tensor] | None = None,
    weights_file: Path | None = None,
    fit: Fit = resize_and_crop,
) -> Clip:
    """CLIP in transformers' format from a folder or a hub id; `others` may lend all but the weights.

    Given `weights` come from `weights_file`.

    Raises:
        ValueError: a file that is missing, unreadable or refused, or that does not fit the others.
    """
    path = weights_file or find(WEIGHTS, model)
    weights = read(path).tensors if weights is None else weights
    settings, images, words = (find((name,), model, *others) for name in (CONFIG, PREPROCESSOR, WORDS))
    config = _config(settings, weights)
    preprocess = _preprocessing(images, config.vision_config.image_size, fit)
    tokenizer = _tokenizer(words, config.text_config)
    files = path, settings, images, *tokenizer_files(tokenizer)
    return Clip(_filled(config, weights), tokenizer, preprocess, files)


def find(names: Sequence[str], *places: str | Path) -> Path:
    """The first file of those names that a place (a folder, or a repository of the hub) has, or the hub's cache.

    Raises:
        ValueError: no place has it, or the hub cannot be asked.
    """
    folders = [folder for place in places if (folder := Path(place).expanduser()).is_dir()]
    repositories = [str(place) for place in places if not Path(place).expanduser().is_dir()]
    here = [folder / name for folder in folders for name in names if (folder / name).is_file()]
    asked = [(repository, name) for repository in repositories for name in names]
    # what is on the disk comes first: a cached model works offline, whichever of the places it came from
    for path in (*here, *filter(None, (_cached(*each) for each in asked))):
        return path
    for repository, name in asked:
        try:
            return Path(hf_hub_download(repository, name))
        except RemoteEntryNotFoundError:
            continue
        except Exception as error:  # offline, no such repository, a proxy's page: the remedy is the same
            lacking = f"{folders[0]} lacks {names[0]}" if folders else f"no folder {repository}"
            raise ValueError(f"{lacking}, and the hub gives no {repository}/{name}") from error
    raise ValueError(f"{' and '.join(map(str, places))} lack{'s' * (len(places) == 1)} {' or '.join(names)}")


@contextmanager
def remedy(scorer: str, model: str | Path, how: str) -> Iterator[None]:
    """Every ValueError within becomes one line that ends in the remedy."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"no {scorer} in {model}: {first_line(error)}; {how}") from error


def _cached(repository: str, name: str) -> Path | None:
    try:
        path = try_to_load_from_cache(repository, name)
    except ValueError:  # no id that the hub could have
        return None
    return Path(path) if isinstance(path, str) else None


def _config(path: Path, weights: Mapping[str, Tensor]) -> Any:
    try:
        config: Any = CLIPConfig.from_dict(_json(path))
    except Exception as error:  # a stranger's settings make transformers raise nearly anything
        raise ValueError(f"{path} is no CLIP's configuration: {first_line(error)}") from error
    # the model is built before its weights are compared: a configuration must not make it endless
    if max(config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers) > len(weights):
        raise ValueError(f"{path} asks for more layers than there are weights")
    return config


def _filled(config: CLIPConfig, weights: Mapping[str, Tensor]) -> CLIPModel:
    """The model of these weights, as float32; ValueError unless they are its own, one and all."""
    # old files hold the buffers 0, 1, 2, ... too
    table = {key: value.float() for key, value in weights.items() if not key.endswith(".position_ids")}
    try:
        with torch.device("meta"):
            model: Any = CLIPModel(config)
        missing, surplus = model.load_state_dict(table, strict=False, assign=True)
    except Exception as error:  # shapes that do not fit, in the configuration or in the weights
        raise ValueError(f"weights that do not fit {CONFIG}: {str(error).splitlines()[-1].strip()}") from error
    if missing or surplus:
        what, keys = ("lack", missing) if missing else ("have too many:", surplus)
        raise ValueError(f"the weights {what} {keys[0]}" + f" and {len(keys) - 1} more" * (len(keys) > 1))
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
    return model


def _tokenizer(path: Path, config: Any) -> CLIPTokenizer:
    try:
        tokenizer = CLIPTokenizer.from_pretrained(path.parent)
    except Exception as error:  # a stranger's file makes the parser raise nearly anything
        raise ValueError(f"{path} is no CLIP's tokenizer: {first_line(error)}") from error
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"{path} has {len(tokenizer)} tokens, the weights are for {config.vocab_size}")
    # 2 is what old files have, for "the largest id"; elsewhere than at its end a prompt would be read as nothing
    end = len(tokenizer) - 1 if config.eos_token_id == 2 else config.eos_token_id
    if tokenizer.eos_token_id != end:
        raise ValueError(f"{path} ends its prompts with {tokenizer.eos_token_id}, the weights are for {end}")
    return tokenizer


def _preprocessing(path: Path, size: int, fit: Fit) -> Preprocessing:
    """CLIP's preprocessing with the file's mean and deviation; ValueError for a file that describes another."""
    settings = _json(path)
    edge, crop = settings.get("size"), settings.get("crop_size")  # numbers in older files
    if edge not in (size, {"shortest_edge": size}) or crop not in (size, {"height": size, "width": size}):
        raise ValueError(f"{path} makes images of size {edge}, cut to {crop}; the weights are for {size}")
    if settings.get("resample", BICUBIC) != BICUBIC or not all(settings.get(step, True) for step in STEPS):
        raise ValueError(f"{path} is not CLIP's preprocessing: bicubic, centre crop, normalised")
    mean, deviation = settings.get("image_mean", []), settings.get("image_std", [])
    for each in (mean, deviation):
        if not (isinstance(each, list) and len(each) == 3 and all(isinstance(v, Real) and isfinite(v) for v in each)):
            raise ValueError(f"{path} needs image_mean and image_std, three numbers each, received {str(each)[:100]}")
    if min(deviation) <= 0:
        raise ValueError(f"{path} has deviations {deviation}; they must be positive")
    return Preprocessing(size, tuple(mean), tuple(deviation), fit)


def _json(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(short_text(path, LARGEST_TEXT))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {first_line(error)}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is no JSON object")
    return settings
