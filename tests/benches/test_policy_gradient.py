"""The bench of the policy gradient runs, and its estimators mean what they say."""

import json
from pathlib import Path

import pytest
import torch

from benches import policy_gradient
from benches.policy_gradient import ESTIMATORS, Options
from scale.train.buffer import Trajectories


def test_the_bench_runs(tmp_path: Path) -> None:
    """At a tiny size it writes a cosine in [-1, 1] and a positive norm for every estimator."""
    options = Options(batches=2, prompts=1, samples=2, steps=2, threads=1)
    policy_gradient.main(options, tmp_path / "figures.json")
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["estimator"] for row in rows] == list(ESTIMATORS)
    assert all(-1 <= row["cosine"] <= 1 and row["norm"] > 0 for row in rows)


def test_cosines_tell_signal_from_noise() -> None:
    """Batches that share half their variance have a mean cosine of 0.5; independent ones (control) have none."""
    generator = torch.Generator().manual_seed(0)
    shared, *noises = torch.randn(9, 20_000, generator=generator)
    half = policy_gradient.row("half", [shared + noise for noise in noises])
    none = policy_gradient.row("none", noises)
    assert half.cosine == pytest.approx(0.5, abs=0.03)
    assert none.cosine == pytest.approx(0.0, abs=0.03)


def test_estimators_by_hand() -> None:
    """Two prompts of two images, two steps: the batch's mean, the prompt's other image, the steps of the value."""
    returns, hints = torch.tensor([1.0, 3.0, 5.0, 9.0]), torch.tensor([[0.0, 0, 0, 0], [1.0, 2, 5, 5]])
    empty = torch.zeros(2, 4)
    batch = Trajectories(
        torch.zeros(3, 4, 1), torch.zeros(2, 4, 1), hints, empty, empty, returns, torch.zeros(4, 1), {}
    )
    found = {name: estimate(batch, 2).tolist() for name, estimate in ESTIMATORS.items()}
    assert found["return - mean of the batch"] == [[-3.5, -1.5, 0.5, 4.5]] * 2
    assert found["return - mean of the prompt"] == [[-2, 2, -4, 4]] * 2
    assert found["change of the value (trace 0)"] == [[-1, 1, 0, 0], [-1, 1, -4, 4]]
    assert found["return - value (trace 1)"] == [[-2, 2, -4, 4], [-1, 1, -4, 4]]
