"""What each of two processes does: trains with its share, and without the others' gradients; then reports.

Started by `test_processes.py`: `torchrun --nproc_per_node 2 -m tests.scale.train.two_processes FOLDER`.
"""

import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState

from scale.train import checkpoint, dpok
from scale.train.settings import Dpok
from tests.scale.train.fixtures import PROMPTS, Brightness, policy, settings, weights

# two prompts x three samples: the shares cut through the samples of a prompt
SHARED = settings(rounds=2, samples_per_prompt=3, batch=12, microbatch=4, learning_rate=1e-3)


def run(options: Dpok, work: Path) -> dict[str, object]:
    """History and weights of a run."""
    trained = policy(options)
    history = dpok.train(trained, Brightness(), PROMPTS, options, work)
    return {"history": history, "weights": weights(trained)}


def main(folder: Path) -> None:
    """Every process writes one report."""
    state, saved = PartialState(cpu=True), []
    save = checkpoint.save
    with mock.patch.object(checkpoint, "save", lambda *it: (saved.append(it), save(*it))):
        report: dict[str, object] = {"processes": state.num_processes, "shared": run(SHARED, folder / "shared")}
    report["saved"] = len(saved)
    report["resumed"] = run(SHARED, folder / "shared")
    with mock.patch.object(dpok, "reduce", lambda gradient, how: gradient):
        report["apart"] = run(SHARED, folder / "apart")
    for name in ("samples_per_prompt", "batch"):
        odd = settings(prompts_per_round=1, **{name: 3})
        try:
            run(odd, folder / "odd")
        except ValueError as error:
            report[name] = str(error)
    torch.save(report, folder / f"report-{state.process_index}.pt")
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
