"""The resumable training loop."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from scale.mini.loop import fit


def _target(module: nn.Module, generator: torch.Generator) -> Tensor:
    x = torch.randn(64, 3, generator=generator)
    return (module(x) - x.sum(1, keepdim=True)).square().mean()


def _train(work: Path, loss=_target, steps: int = 300) -> nn.Linear:
    torch.manual_seed(0)
    module = fit("line", nn.Linear(3, 1), loss, steps=steps, learning_rate=0.1, seed=0, work=work, checkpoint_every=10)
    assert isinstance(module, nn.Linear)
    return module


def test_it_fits(tmp_path: Path) -> None:
    """A linear map is learnt to 1e-2, once the run is long against the average's memory of 500 steps."""
    module = _train(tmp_path, steps=5000)
    assert torch.allclose(module.weight, torch.ones(1, 3), atol=1e-2)


def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    """Killed between two checkpoints and run again, the averaged weights are the same bit for bit."""
    expected, calls = _train(tmp_path / "whole"), 0

    def killed(module: nn.Module, generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 137:
            raise KeyboardInterrupt
        return _target(module, generator)

    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "killed", killed)
    assert torch.equal(_train(tmp_path / "killed").weight, expected.weight)


def test_divergence_stops_it(tmp_path: Path) -> None:
    """A loss that is not finite ends the run with a message, not with broken weights."""
    with pytest.raises(FloatingPointError, match="loss of line"):
        _train(tmp_path, lambda module, generator: _target(module, generator) * torch.inf)
