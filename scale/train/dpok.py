"""DPOK: fine-tune a LoRA adapter for one reward by policy gradient, under a KL penalty to the base model.

Fan et al. 2023; paper eq. 4: maximise `E[r(x_0)] - alpha sum_t KL(p_t(.|x_t) || p_t^pre(.|x_t))` over DDIM's Gaussian
steps. Each round samples trajectories with the current adapter, scores their images, and makes a few clipped
policy-gradient updates on their transitions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from dbtheory.files import write_atomically
from scale.progress import progress_bar
from scale.rewards.protocol import Scorer
from scale.train.policy import Policy, Rollout, kl_divergence, log_probability

ADAPTER = "expert"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2")


@dataclass(frozen=True)
class Dpok:
    """Settings of a run. `alpha`, in units of the reward, weighs the KL in nats, summed over steps and dimensions."""

    alpha: float = 1e-4
    rounds: int = 30
    prompts_per_round: int = 8
    samples_per_prompt: int = 8
    steps: int = 20
    """DDIM steps of a trajectory, eta = 1."""
    guidance: float = 1.0
    """1 is none: half the cost, and the images of a prompt vary more, which is what the policy gradient feeds on."""
    transitions: float = 0.5
    """Share of a round's transitions that its updates use."""
    updates: int = 6
    """Optimizer steps a round."""
    microbatch: int = 64
    learning_rate: float = 1e-3
    clip: float = 1e-2
    """The probability ratio per dimension is clipped to 1 +- clip."""
    rank: int = 4
    targets: tuple[str, ...] = ATTENTION + CONVOLUTIONS
    bf16: bool = True
    """Run the denoiser under bfloat16 autocast."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "alpha",
            "rounds",
            "prompts_per_round",
            "steps",
            "updates",
            "learning_rate",
            "clip",
            "rank",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, received {getattr(self, name)}")
        if not (0 < self.transitions <= 1 and self.microbatch >= 1):
            raise ValueError(
                f"received transitions {self.transitions} and microbatch {self.microbatch}; use (0, 1] and at least 1"
            )
        if self.samples_per_prompt < 2:
            raise ValueError("samples_per_prompt must be at least 2: their mean is the baseline of the prompt")


@dataclass(frozen=True)
class Transitions:
    """Single steps of trajectories, flattened: what one update sees."""

    x: Tensor
    x_next: Tensor
    t: Tensor
    text: Tensor
    advantage: Tensor
    log_probability: Tensor
    base_mean: Tensor


def train(
    pipe: StableDiffusionPipeline, scorer: Scorer, prompts: Sequence[str], settings: Dpok, work: Path
) -> list[dict]:
    """Add a LoRA adapter named "expert" to the pipeline's denoiser and train it; returns one record a round.

    A killed run resumes from its last round in `work`.
    """
    torch.manual_seed(settings.seed)
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(
        LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=list(settings.targets)),
        adapter_name=ADAPTER,
    )
    parameters = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=1e-4)
    policy, history = Policy(pipe, settings.steps, settings.guidance, settings.bf16), _resume(pipe, optimizer, work)

    with progress_bar() as bar:
        task = bar.add_task(scorer.name, total=settings.rounds, completed=len(history), note="")
        for index in range(len(history), settings.rounds):
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + index)
            record = _round(policy, scorer, prompts, settings, optimizer, generator, history)
            history.append(record)
            _save(pipe, optimizer, history, work)
            bar.update(task, advance=1, note=" ".join(f"{k} {v:.4g}" for k, v in record.items()))
    return history


def _round(
    policy: Policy, scorer: Scorer, prompts: Sequence[str], settings: Dpok, optimizer: torch.optim.Optimizer,
    generator: torch.Generator, history: list[dict],
) -> dict:  # fmt: skip
    """Sample, score, update."""
    rows = torch.randint(len(prompts), (settings.prompts_per_round,), generator=generator)
    chosen = [prompts[int(i)] for i in rows for _ in range(settings.samples_per_prompt)]
    rollout = policy.rollout(chosen, generator)
    scores = scorer.score(rollout.images, chosen).to(rollout.images.device)
    # the spread of the base model's rewards fixes the scale of the objective for the whole run
    scale = history[0]["spread"] if history else float(scores.std())
    if not scale > 0:  # NaN too
        raise ValueError(f"{scorer.name} gave the images of the first round one score, or NaN: nothing to learn")
    groups = scores.unflatten(0, (-1, settings.samples_per_prompt))
    advantage = ((groups - groups.mean(1, keepdim=True)) / scale).flatten()
    batch = _transitions(policy, rollout, advantage, settings, generator)
    kl, ratio = _update(policy, batch, settings, optimizer, settings.alpha / scale)
    return {"reward": float(scores.mean()), "spread": float(scores.std()), "kl": kl, "ratio": ratio}


@torch.no_grad()
def _transitions(
    policy: Policy, rollout: Rollout, advantage: Tensor, settings: Dpok, generator: torch.Generator
) -> list[Transitions]:
    """A shuffled share of all transitions, with the base model's view of each: its own step, adapters switched off."""
    steps, n = len(rollout.timesteps), len(rollout.prompts)
    order = torch.randperm(steps * n, generator=generator)[: int(settings.transitions * steps * n)]
    batches = []
    for rows in order.split(settings.microbatch):
        k, i = rows // n, rows % n
        x, x_next, t, text = (
            rollout.latents[k, i],
            rollout.latents[k + 1, i],
            rollout.timesteps[k],
            rollout.text[:, i],
        )
        policy.pipe.unet.disable_adapters()
        base_mean, _ = policy.moments(x, t, policy.noise(x, t, text))
        policy.pipe.unet.enable_adapters()
        batches.append(Transitions(x, x_next, t, text, advantage[i], rollout.log_probabilities[k, i], base_mean))
    return batches


def _update(
    policy: Policy,
    batches: list[Transitions],
    settings: Dpok,
    optimizer: torch.optim.Optimizer,
    kl_weight: float,
) -> tuple[float, float]:
    """Clipped policy gradient with the KL penalty; returns the mean KL of a trajectory (nats) and max |ratio - 1|."""
    kls, ratios = [], []
    for group in _groups(batches, settings.updates):
        optimizer.zero_grad(set_to_none=True)
        for batch in group:
            mean, std = policy.moments(batch.x, batch.t, policy.noise(batch.x, batch.t, batch.text))
            ratio = (log_probability(batch.x_next, mean, std) - batch.log_probability).exp()
            clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
            gain = torch.minimum(ratio * batch.advantage, clipped * batch.advantage).mean()
            kl = kl_divergence(mean, batch.base_mean, std).mean()
            ((kl_weight * kl - gain) / len(group)).backward()
            kls.append(float(kl.detach()) * batch.x[0].numel() * settings.steps)
            ratios.append(float((ratio.detach() - 1).abs().max()))
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
    return sum(kls) / len(kls), max(ratios)


def _groups(batches: list[Transitions], count: int) -> Iterator[list[Transitions]]:
    """The microbatches in `count` nearly equal groups, one an optimizer step."""
    edges = [round(i * len(batches) / count) for i in range(count + 1)]
    return (batches[a:b] for a, b in pairwise(edges) if b > a)


def save_adapter(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write the trained adapter as diffusers' `pytorch_lora_weights.safetensors`."""
    trained = get_peft_model_state_dict(pipe.unet, adapter_name=ADAPTER)
    layers: dict[str, Any] = {key: value.half().contiguous() for key, value in trained.items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, safe_serialization=True)


def _save(pipe: StableDiffusionPipeline, optimizer: torch.optim.Optimizer, history: list[dict], work: Path) -> None:
    state = {
        "adapter": get_peft_model_state_dict(pipe.unet, adapter_name=ADAPTER),
        "optimizer": optimizer.state_dict(),
        "history": history,
    }
    write_atomically(work / "checkpoint.pt", lambda temporary: torch.save(state, temporary))


def _resume(pipe: StableDiffusionPipeline, optimizer: torch.optim.Optimizer, work: Path) -> list[dict]:
    path = work / "checkpoint.pt"
    if not path.exists():
        return []
    state = torch.load(path, weights_only=True)
    set_peft_model_state_dict(pipe.unet, state["adapter"], adapter_name=ADAPTER)
    optimizer.load_state_dict(state["optimizer"])
    return state["history"]
