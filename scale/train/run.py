"""One training run: an adapter on a pipeline, trained for a reward, written beside the record of how it came about."""

import hashlib
import json
import math
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from peft.utils import get_peft_model_state_dict

from dbtheory.files import write_atomically
from scale.adapters import FILE_NAMES
from scale.hashes import denoiser_hashes
from scale.train import checkpoint
from scale.train.denoiser import ADAPTER, DenoiserPolicy
from scale.train.divergence import WINDOW, Diverged
from scale.train.experiment import algorithm_of, trainer_of
from scale.train.observe import Observer
from scale.train.policy import Reward

WEIGHTS, CARD, CLAIM = FILE_NAMES[0], "training.json", "run.json"
SMALL_WORLD = "the shipped small world"
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Card = dict[str, Any]


def fine_tune(
    pipe: DiffusionPipeline, reward: Reward, prompts: Sequence[str], settings: Any, work: Path, out: Path, *,
    reward_text: str | None = None, reward_models: Mapping[str, str | Path] | None = None,
    model: str | Path | None = None, samples: Path | None = None,
) -> Card:  # fmt: skip
    """Train an adapter for `reward` on the pipeline's denoiser; returns what `training.json` says of it.

    `settings` choose the algorithm (`Dpok`, `Tilted`). `out` receives the adapter in half precision and
    `training.json`; `work` the checkpoints, TensorBoard's logs and sheets of samples. A killed run resumes.
    For the record alone are the reward as its user wrote it, the models of its parts, and the pipeline's folder or hub
    id (None: the small world). `samples` is the folder of base samples that experts made by `Tilted` may share.

    Raises:
        ValueError: `work` or `out` of another run; whatever the trainer, the policy and the reward refuse; too little
            memory.
        Diverged: the run was stopped; `out` is as it was.

    Warns:
        RuntimeWarning: the CPU has to emulate the precision.
    """
    who = identity(reward_text or reward.name, prompts, settings, model, reward_models)
    who |= {"denoiser": denoiser_hashes(pipe)}
    check_folders(who, work, out)
    if samples is not None and algorithm_of(settings) != "tilted":
        raise ValueError(f"samples belong to the algorithm tilted, received {samples} for {algorithm_of(settings)}")
    options: dict[str, Any] = {} if samples is None else {"samples": samples}
    policy = make_policy(pipe, settings)
    if PartialState().is_main_process:
        write_atomically(work / CLAIM, lambda path: path.write_text(json.dumps(who, indent=1) + "\n"))
    sheet_every = getattr(settings, "sheet_every", 0)
    _warn_of_emulation(settings.precision, policy.device)
    try:
        with Observer(policy, prompts, work, settings.rounds, sheet_every, settings.rollout_batch) as observe:
            history = trainer_of(settings)(policy, reward, prompts, settings, work, observe=observe, **options)
    except Diverged as error:
        raise Diverged(f"{error}{_keep_best(policy, pipe, work)}") from error
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "the GPU has too little memory; use a smaller microbatch or rollout_batch, gradient_checkpointing, or bf16"
        ) from error
    made = who | _results(history, settings, len(prompts), work)
    made |= {"version": _version()}
    made |= {"history": [{name: _finite(value) for name, value in record.items()} for record in history]}
    if PartialState().is_main_process:
        save_adapter(pipe, out)
        write_atomically(out / CARD, lambda path: path.write_text(as_text(made)))
    PartialState().wait_for_everyone()
    return made


def _warn_of_emulation(precision: str, device: torch.device) -> None:
    """With AVX2 alone, the small world's denoiser took 30 times as long in bf16 as in float32."""
    if device.type == "cpu" and precision != "no" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        text = f"this CPU emulates {precision}, many times slower than float32; set precision=no"
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def make_policy(pipe: DiffusionPipeline, settings: Any) -> DenoiserPolicy:
    """The pipeline as a policy with a fresh adapter, at the settings' precision.

    The denoiser and the text encoders may be stored in half precision; the decoder runs in float32, for SDXL's
    overflows in float16.
    """
    parts: Any = pipe
    precision, device = PRECISIONS[settings.precision], parts.device.type
    policy = DenoiserPolicy(
        pipe, settings.steps, settings.guidance, size=getattr(settings, "size", None),
        autocast=lambda: torch.autocast(device, precision, enabled=settings.precision != "no"),
    )  # fmt: skip
    parts.vae.float()
    if getattr(settings, "gradient_checkpointing", False):
        parts.unet.enable_gradient_checkpointing()
    policy.add_adapter(settings.rank, settings.targets, settings.seed)
    return policy


def identity(
    reward: str, prompts: Sequence[str], settings: Any, model: str | Path | None = None,
    reward_models: Mapping[str, str | Path] | None = None,
) -> Card:  # fmt: skip
    """What tells one run from another, without a path of this machine."""
    return {
        "reward": reward,
        "reward_models": {name: _placed(place) for name, place in (reward_models or {}).items()},
        "model": SMALL_WORLD if model is None else _shown(model),
        "algorithm": algorithm_of(settings),
        "alpha": settings.alpha,
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "settings": checkpoint.plain(settings),
    }


def check_folders(who: Card, work: Path, out: Path) -> None:
    """ValueError if `work` holds another run, or `out` another adapter: they would be lost, or mixed up."""
    for folder in (work, out):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; choose another folder")
    begun = (work / CLAIM).exists() or (work / checkpoint.LAST).exists()
    if begun and (other := _difference(who, work / CLAIM)):
        raise ValueError(f"{work} holds a run with {other}; choose another folder, or delete it")
    # a run that was killed between the adapter and its card left the adapter alone
    ended = (out / CARD).exists() or not begun
    if ended and any((out / name).exists() for name in FILE_NAMES) and (other := _difference(who, out / CARD)):
        raise ValueError(f"{out} holds an adapter with {other}; choose another folder, or move it away")


def _difference(who: Card, path: Path) -> str:
    """What the run that a file describes has of its own; nothing if it is this one."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        theirs = {name: stored[name] for name in who}
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return f"no readable {path.name}"
    changed = [name for name in who if theirs[name] != who[name]]
    return f"another {', '.join(changed)}" if changed else ""


def _keep_best(policy: DenoiserPolicy, pipe: Any, work: Path) -> str:
    """Write the best weights of a run that diverged as an adapter of its own; what to say of it."""
    path = work / checkpoint.BEST
    if not path.exists():
        return ""
    if PartialState().is_main_process:
        checkpoint.put(policy.trainable(), torch.load(path, weights_only=True, map_location="cpu")["adapter"])
        save_adapter(pipe, work / "best")
    return f", and as an adapter in {work / 'best'}"


def save_adapter(pipe: Any, out: Path) -> None:
    """Write the trained adapter as diffusers' `pytorch_lora_weights.safetensors`, in half precision."""
    trained = get_peft_model_state_dict(pipe.unet, adapter_name=ADAPTER)
    layers = {key: value.half().contiguous() for key, value in trained.items()}
    if bad := [key for key, value in layers.items() if not bool(value.isfinite().all())]:
        raise ValueError(f"the trained adapter is not finite in half precision, in {bad[0]}; lower the learning rate")
    write_atomically(
        out / WEIGHTS,
        lambda path: pipe.save_lora_weights(path.parent, unet_lora_layers=layers, weight_name=path.name),
    )


def as_text(card: Card) -> str:
    """JSON with one line a round."""
    head = json.dumps({name: value for name, value in card.items() if name != "history"}, indent=1, allow_nan=False)
    rounds = ",\n".join(f"  {json.dumps(record, allow_nan=False)}" for record in card["history"])
    return f'{head[:-2]},\n "history": [\n{rounds}\n ]\n}}\n'


def _results(history: Sequence[Mapping[str, float]], settings: Any, prompts: int, work: Path) -> Card:
    """Images drawn and scored; the base model's mean reward; DPOK's reward and KL, means over its last five rounds."""
    state = torch.load(work / checkpoint.LAST, weights_only=True, map_location="cpu")
    facts = {"reward_first": history[0]["reward"], "seconds": round(state["seconds"], 1)}
    if algorithm_of(settings) == "tilted":  # scores no image of the model that it trains
        images = min(settings.prompts, prompts) * settings.samples_per_prompt
        return facts | {"images": images, "reward_goal": history[-1]["goal"]}
    last = history[-WINDOW:]
    means = {name: sum(record[name] for record in last) / len(last) for name in ("reward", "kl")}
    return facts | {"images": len(history) * settings.images, "reward_last": means["reward"], "kl": means["kl"]}


def _finite(value: float) -> float | None:
    """JSON has neither NaN nor infinity, and under fp16 the norm of a skipped gradient is one of them."""
    return value if math.isfinite(value) else None


def _shown(place: str | Path) -> str:
    """A hub id as it is, a folder by its name."""
    return Path(place).resolve().name if Path(place).exists() else str(place)


def _placed(place: str | Path) -> str:
    """The same with a digest of where the folder is, so that two of one name stay two."""
    if not Path(place).exists():
        return str(place)
    return f"{_shown(place)} ({hashlib.sha256(str(Path(place).resolve()).encode()).hexdigest()[:8]})"


def _version() -> str:
    """The commit of the source checkout (`-dirty` where files changed since), else the installed package's version."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass
    try:
        return version("diffusion-blend")
    except PackageNotFoundError:
        return "unknown"
