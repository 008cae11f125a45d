"""What stops a run: numbers that are none, steps far outside the clip, a reward that falls."""

from collections.abc import Mapping, Sequence
from math import isfinite

import torch
from accelerate.utils import gather
from torch import Tensor

from scale.train.settings import Dpok

WINDOW = 5  # rounds whose mean reward is compared


class Diverged(RuntimeError):
    """A training run was stopped because it went astray."""


def check_update(record: Mapping[str, float], scaler: torch.amp.GradScaler, settings: Dpok) -> None:
    """Diverged if an update's numbers are not finite, or its probability ratios exploded."""
    # under fp16 an overflow now and then is the scaler's business, unless it has nowhere left to go
    overflowed = scaler.is_enabled() and scaler.get_scale() > 1
    if not isfinite(record["kl"]) or not (isfinite(record["gradient"]) or overflowed):
        raise Diverged(f"the loss is not finite: KL {record['kl']:g}, gradient norm {record['gradient']:g}")
    if not record["ratio"] <= settings.max_ratio:
        raise Diverged(
            f"the probability ratio left 1 +- {settings.max_ratio:g} by {record['ratio']:g}; lower the learning rate"
        )


def check_states(states: Sequence[Tensor]) -> None:
    """Diverged, on every process, if the states of any process's trajectories are not finite."""
    finite = torch.tensor([all(bool(part.isfinite().all()) for part in states)], device=states[0].device)
    if not bool(torch.as_tensor(gather(finite)).all()):
        raise Diverged("the policy's samples are not finite")


def check_history(history: Sequence[Mapping[str, float]], settings: Dpok) -> None:
    """Diverged if the mean reward of the last rounds lies far below that of the first."""
    if len(history) < 2 * WINDOW:
        return
    first, last = (sum(r["reward"] for r in part) / WINDOW for part in (history[:WINDOW], history[-WINDOW:]))
    spread = history[0]["spread"]
    if not first - last <= settings.collapse * spread:
        raise Diverged(
            f"the reward fell from {first:.4g} to {last:.4g}, over {settings.collapse:g} standard deviations"
        )
