"""The base model's own samples and their rewards, on disk in parts: made once, shared, and resumed after a kill."""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dbtheory.files import write_atomically
from scale.train.dpok import generator_of
from scale.train.policy import Condition, Policy, Reward, State
from scale.train.tilted_settings import Tilted

ABOUT = "about.json"
KEY = "values"
SAME_MODEL = 0.2  # of a sample's RMS: rounding on another machine stays below, the sample of another model does not


class NoisePolicy(Policy, Protocol):
    """A policy whose denoiser predicts noise: z in `x_t = sqrt(alphas[k]) x_0 + sqrt(1 - alphas[k]) z` at step k."""

    alphas: Float[Tensor, " steps"]

    def encode(self, prompts: Sequence[str]) -> Condition:
        """What the denoiser is told of each prompt."""
        ...

    def noise(self, x: State, k: Int64[Tensor, " n"], condition: Condition) -> State:
        """Prediction of z at steps `k`."""
        ...


def base_samples(policy: NoisePolicy, texts: Sequence[str], settings: Tilted, folder: Path) -> State:
    """A sample of the base model for every text; those that `folder` holds already are read.

    Raises:
        ValueError: `folder` holds samples of other texts, settings or another model, or a broken file.
    """

    def make(rows: range) -> Tensor:
        generators = [generator_of(settings.seed, row, 1) for row in rows]
        with policy.base():
            return policy.rollout([texts[row] for row in rows], generators).states[-1]

    about = {
        "texts": list(texts), "seed": settings.seed, "steps": policy.steps, "guidance": settings.guidance,
        "rollout_batch": settings.rollout_batch,
    }  # fmt: skip
    _claim(folder, about)
    _check_model(make, folder / "first.safetensors")
    return _in_parts(folder, len(texts), settings.rollout_batch, make)


@torch.no_grad()
def scores(
    policy: Policy,
    reward: Reward,
    samples: State,
    texts: Sequence[str],
    settings: Tilted,
    folder: Path,
) -> Float[Tensor, " n"]:
    """The reward of every sample's image; those that `folder` holds already are read.

    Raises:
        ValueError: `folder` holds scores of another reward or other samples; a score that is not finite.
    """

    def make(rows: range) -> Tensor:
        images = policy.decode(samples[rows.start : rows.stop].to(policy.device))
        return reward.score(images, [texts[row] for row in rows]).float()

    _claim(
        folder,
        {"reward": reward.name, "sha256": hashlib.sha256(samples.cpu().contiguous().numpy().tobytes()).hexdigest()},
    )
    values = _in_parts(folder, len(texts), settings.rollout_batch, make)
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"{reward.name} gave {int((~values.isfinite()).sum())} of {len(values)} images no finite score"
        )
    return values


def _in_parts(folder: Path, total: int, size: int, make: Callable[[range], Tensor]) -> Tensor:
    """Rows 0 .. total - 1 in parts of `size`: each process makes its share of those that are missing, all read all."""
    state, parts = PartialState(), []
    jobs = {
        folder / f"part-{start:08d}.safetensors": range(start, min(start + size, total))
        for start in range(0, total, size)
    }
    for path, rows in list(jobs.items())[state.process_index :: state.num_processes]:
        if not path.exists():
            values = {KEY: make(rows).float().cpu().contiguous()}
            write_atomically(path, partial(save_file, values))
    state.wait_for_everyone()
    for path, rows in jobs.items():
        parts.append(_read(path))
        if len(parts[-1]) != len(rows):
            raise ValueError(f"{path} holds {len(parts[-1])} rows, not {len(rows)}; delete it, and it is made again")
    return torch.cat(parts)


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Write what the folder is of; ValueError where it is of something else."""
    path = folder / ABOUT
    if PartialState().is_main_process and not path.exists():
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(about)))
    PartialState().wait_for_everyone()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); delete {folder}, and it is made again") from error
    if found != about:
        changed = [name for name, value in about.items() if not isinstance(found, dict) or found.get(name) != value]
        raise ValueError(f"{folder} is of another {', '.join(changed)}; choose another folder, or delete it")


def _check_model(sample: Callable[[range], Tensor], path: Path) -> None:
    """The first sample drawn alone, kept beside the others, tells the model that made them from another."""
    again = sample(range(1)).float().cpu()
    if PartialState().is_main_process and not path.exists():
        write_atomically(path, partial(save_file, {KEY: again.contiguous()}))
    PartialState().wait_for_everyone()
    kept = _read(path)
    if kept.shape != again.shape or (again - kept).square().mean() > SAME_MODEL**2 * kept.square().mean():
        raise ValueError(f"{path.parent} holds samples of another model; choose another folder, or delete it")


def _read(path: Path) -> Tensor:
    try:
        return load_file(path)[KEY]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it, and it is made again") from error
