"""One resumable training loop for every supervised part of the small world."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dbtheory.files import write_atomically
from scale.progress import progress_bar

EMA_DECAY = 0.998


def fit(
    name: str,
    module: nn.Module,
    loss_at: Callable[[nn.Module, torch.Generator], Tensor],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    work: Path,
    checkpoint_every: int = 200,
) -> nn.Module:
    """Minimise `loss_at(module, generator)` by AdamW under a OneCycle rate; return the averaged (EMA) module.

    Every step draws from a generator seeded by (seed, step), so a run that was killed resumes from its last checkpoint
    in `work` and ends like one that was not.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
    state = {"module": module, "average": average, "optimizer": optimizer, "rate": rate}
    path = work / f"{name}.checkpoint.pt"
    first = _resume(path, state)

    module.train()
    with progress_bar() as bar:
        task = bar.add_task(name, total=steps, completed=first, note="")
        for step in range(first, steps):
            loss = loss_at(module, torch.Generator().manual_seed(seed * 1_000_003 + step))
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss of {name} is {loss.item()} at step {step}; lower the learning rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            rate.step()
            average.update_parameters(module)
            if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
                _save(path, state, step + 1)
            bar.update(task, advance=1, note=f"loss {loss.item():.4f}")
    return average.module.eval()


def _save(path: Path, state: dict, step: int) -> None:
    values = {name: part.state_dict() for name, part in state.items()} | {"step": step}
    write_atomically(path, lambda temporary: torch.save(values, temporary))


def _resume(path: Path, state: dict) -> int:
    if not path.exists():
        return 0
    values = torch.load(path, weights_only=True)
    for name, part in state.items():
        part.load_state_dict(values[name])
    return values["step"]
