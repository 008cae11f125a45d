"""`dblend generate`: prompts in, PNG files and the record of what made them out."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dbtheory.files import write_atomically
from dbtheory.preference import Preference
from scale import mini
from scale.attachment import attach
from scale.methods import make_blender
from scale.pipeline import Picture, draw, open_pipeline
from scale.progress import progress_bar
from scale.rewards import SCORERS, Scorer, load_scorer

RECORD = "generation.json"
LAST_SEED = 2**63 - 1  # torch takes more, but not every record of them does
PACKAGES = ("diffusion-blend", "torch", "diffusers", "peft", "transformers")


@dataclass(frozen=True)
class Request:
    """What to generate: `num` images a prompt, of seeds `seed, seed + 1, ...`."""

    prompts: Sequence[str]
    weights: Mapping[str, float]
    out: Path
    kl_scale: float = 1.0
    method: str = "mpa"
    model: str | None = None
    """A diffusers folder or hub id; None is the shipped small world."""
    adapters: Mapping[str, Path] | None = None
    """Adapters by name, besides the shipped ones of the small world."""
    seed: int = 0
    num: int = 1
    steps: int = 50
    guidance: float | None = None
    eta: float = 1.0
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("num", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, received {getattr(self, name)}")
        if not 0 <= self.seed <= LAST_SEED - self.num:
            raise ValueError(f"seeds must lie in [0, 2**63), received {self.seed} for the first of {self.num}")
        if self.method == "base":
            Preference({"ignored": 1.0}, self.kl_scale)  # weights do not matter here, but a wrong lambda is a mistake
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], received {self.eta}")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be finite, received {self.guidance}")
        if not any(prompt.strip() for prompt in self.prompts):
            raise ValueError("no prompt; give --prompt TEXT or --prompt-file FILE")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"the output folder {self.out} is a file; choose another folder")

    @property
    def preference(self) -> Preference | None:
        """None for the base model, which follows no preference."""
        return None if self.method == "base" else Preference(self.weights, self.kl_scale)

    def chosen_adapters(self) -> dict[str, Path]:
        """The adapters that the weights name; ValueError for a name without an adapter."""
        if self.method == "base":
            return {}
        if not self.weights:
            raise ValueError(f"the method {self.method} needs weights; give --weights NAME=WEIGHT of each adapter")
        shipped = {path.name: path for path in mini.ADAPTERS.glob("*/")} if self.model is None else {}
        known = {**shipped, **(self.adapters or {})}
        unknown = [name for name in self.weights if name not in known]
        if unknown:
            raise ValueError(
                f"no adapter for the weight of {', '.join(unknown)}; "
                f"the adapters are {', '.join(sorted(known)) or 'none'}"
            )
        return {name: known[name] for name in self.weights}


def generate(request: Request) -> Path:
    """Make the images of a request; returns the path of the record, which is brought up to date after every batch.

    Raises:
        ValueError: anything wrong with the request (before the model is loaded), the model or the adapters.
        OSError: a picture or the record cannot be written; what was written before stays.
    """
    adapters, preference = request.chosen_adapters(), request.preference
    if preference is not None:
        make_blender(request.method, preference, adapters)  # refuses a bad request before the model is loaded
    pipe = open_pipeline(request.model or mini.MODEL)
    if preference is not None:
        attach(pipe, adapters, preference, request.method)
    guidance = mini.GUIDANCE if request.model is None and request.guidance is None else request.guidance
    pictures = [
        Picture(prompt, index, request.seed + i)
        for index, prompt in enumerate(request.prompts)
        for i in range(request.num)
    ]
    scorers = [load_scorer(name) for name in SCORERS]
    request.out.mkdir(parents=True, exist_ok=True)
    record = _settings(request, adapters, pipe, guidance)
    with progress_bar() as bar:
        task = bar.add_task("images", total=len(pictures), note="")
        for batch, images in draw(
            pipe, pictures, steps=request.steps, guidance=guidance, eta=request.eta,
            batch_size=request.batch_size, advance=lambda k: bar.update(task, advance=k),
        ):  # fmt: skip
            if not record["images"]:
                (request.out / RECORD).unlink(missing_ok=True)  # an older record must not describe new pictures
            for picture, image in zip(batch, images, strict=True):
                record["images"].append(_save(picture, image, scorers, request.out))
            write_atomically(request.out / RECORD, lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    return request.out / RECORD


def _settings(request: Request, adapters: Mapping[str, Path], pipe: Any, guidance: float | None) -> dict[str, Any]:
    preference = request.preference
    return {
        "model": request.model or "the shipped small world",
        "method": request.method,
        "weights": preference.weights if preference else {},
        "kl_scale": preference.kl_scale if preference else 0.0,
        "coefficients": preference.coefficients() if preference else {"base": 1.0},
        "adapters": {name: path.name if path.parent == mini.ADAPTERS else str(path) for name, path in adapters.items()},
        "scheduler": type(pipe.scheduler).__name__,
        "steps": request.steps,
        "guidance": guidance,
        "eta": request.eta,
        "batch_size": request.batch_size,
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "versions": {name: _version(name) for name in PACKAGES},
        "images": [],
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # this one, when it runs from a checkout


def _save(picture: Picture, image: Tensor, scorers: Sequence[Scorer], out: Path) -> dict[str, Any]:
    # numbers alone name the file: a prompt may hold path separators
    name = f"{picture.index:05d}-{picture.seed}.png"
    pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
    write_atomically(out / name, lambda path: Image.fromarray(pixels).save(path))
    rewards = score_known(scorers, torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255, picture.prompt)
    return {"file": name, "prompt": picture.prompt, "seed": picture.seed, "rewards": rewards}


def score_known(scorers: Sequence[Scorer], image: Tensor, prompt: str) -> dict[str, float]:
    """Scores of one image (1, 3, H, W) by every scorer that knows its prompt (`alignment` knows the small world's)."""
    scores = {}
    for scorer in scorers:
        try:
            scores[scorer.name] = float(scorer.score(image, [prompt]))
        except ValueError:
            if scorer.name != "alignment":
                raise
    return scores
