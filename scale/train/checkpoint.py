"""Checkpoints of a run: all that it takes to go on as if nothing had happened."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dbtheory.files import write_atomically
from scale.train.buffer import Trajectories
from scale.train.divergence import WINDOW

if TYPE_CHECKING:
    from scale.train.dpok import Learner

LAST, BEST = "checkpoint.pt", "best.pt"


def save(learner: "Learner", history: list[dict[str, float]], seconds: float, work: Path) -> None:
    """Write `checkpoint.pt`, and `best.pt` too where the last rounds' mean reward is the best so far.

    `best.pt` has the adapter that drew the last round's images, not what the updates then made of it.
    """
    buffer = learner.buffer
    state = {
        "settings": plain(learner.settings),
        "adapter": {name: p.detach() for name, p in learner.policy.trainable().items()},
        "optimizer": learner.optimizer.state_dict(),
        "scaler": learner.scaler.state_dict(),
        "value": learner.value.state_dict(),
        "value_optimizer": learner.value_optimizer.state_dict(),
        "buffer": None if buffer is None else buffer.to_dict(),
        "history": history,
        "seconds": seconds,
    }
    every = learner.settings.checkpoint_every
    ends = [*range(every, len(history), every), len(history)]  # the rounds that were saved
    means = [sum(r["reward"] for r in history[max(0, i - WINDOW) : i]) / min(i, WINDOW) for i in ends]
    if means[-1] == max(means):
        write_atomically(work / BEST, lambda path: torch.save({"adapter": learner.drew, "history": history}, path))
    # last: a run that was killed in between does this round again, and so writes the best again too
    write_atomically(work / LAST, lambda path: torch.save(state, path))


def resume(learner: "Learner", work: Path) -> tuple[list[dict[str, float]], float]:
    """Put the last checkpoint in `work` into the learner; its records and seconds, empty and 0 where there is none.

    Raises:
        ValueError: the checkpoint belongs to other settings.
    """
    path = work / LAST
    if not path.exists():
        return [], 0.0
    state = torch.load(path, weights_only=True, map_location="cpu")  # the optimizer keeps its step counters there
    if state["settings"] != plain(learner.settings):
        changed = [name for name, value in plain(learner.settings).items() if state["settings"].get(name) != value]
        raise ValueError(f"{path} is of a run with another {', '.join(changed)}; choose another folder, or delete it")
    put(learner.policy.trainable(), state["adapter"])
    for name in ("optimizer", "scaler", "value", "value_optimizer"):
        getattr(learner, name).load_state_dict(state[name])
    if state["buffer"] is not None:
        device = learner.policy.device
        learner.buffer = Trajectories(**state["buffer"]).mapped(lambda value: value.to(device))
    return state["history"], state["seconds"]


@torch.no_grad()
def put(parameters: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]) -> None:
    """Copy stored values into the parameters of the same names."""
    for name, parameter in parameters.items():
        parameter.copy_(stored[name])


def last_good(work: Path) -> str:
    """Where the weights of a stopped run are: `checkpoint.pt` may already hold what made it stop."""
    path = work / BEST
    return f"the last good weights are in {path}" if path.exists() else "before the first checkpoint"


def plain(settings: Any) -> dict[str, Any]:
    """Settings as a checkpoint and a JSON file store them."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(settings).items()}
