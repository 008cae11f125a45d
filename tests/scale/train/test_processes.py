"""Two processes train what one process trains."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.scale.train.fixtures import policy, weights
from tests.scale.train.two_processes import SHARED, run

pytestmark = pytest.mark.slow  # two processes import everything anew


@pytest.fixture(scope="module")
def folder(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes worked; `--standalone` lets the system choose their port."""
    made = tmp_path_factory.mktemp("processes")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launch, "-m", "tests.scale.train.two_processes", str(made)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return made


@pytest.fixture(scope="module")
def reports(folder: Path) -> list[dict[str, Any]]:
    """One a process."""
    return [torch.load(folder / f"report-{index}.pt", weights_only=True) for index in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same run in this process."""
    return run(SHARED, tmp_path_factory.mktemp("alone"))


def _way(end: Tensor, other: Tensor) -> float:
    """Distance of two ends, as a share of the way from the beginning."""
    return float((end - other).norm() / (end - weights(policy(SHARED))).norm())


def test_two_processes_end_where_one_does(reports: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """Weights within 1e-3 of the way that they went, and every figure of the history within 5e-3 of itself.

    No closer: batches of other shapes round differently, and the largest |ratio - 1| is itself near rounding.
    Controls: without averaging gradients the processes end apart from it and from each other, a hundred times as far.
    """
    assert [report["processes"] for report in reports] == [2, 2]
    for report in reports:
        assert _way(alone["weights"], report["shared"]["weights"]) < 1e-3
        for ours, theirs in zip(report["shared"]["history"], alone["history"], strict=True):
            assert ours == pytest.approx(theirs, rel=5e-3, abs=0.0)
        assert _way(alone["weights"], report["apart"]["weights"]) > 0.1
    assert _way(reports[0]["apart"]["weights"], reports[1]["apart"]["weights"]) > 0.1


def test_both_know_the_same(reports: list[dict[str, Any]]) -> None:
    """Weights and history of the two are equal bit for bit."""
    first, second = (report["shared"] for report in reports)
    assert torch.equal(first["weights"], second["weights"])
    assert first["history"] == second["history"]


def test_one_of_them_writes_the_checkpoint_and_both_resume(folder: Path, reports: list[dict[str, Any]]) -> None:
    """The main process saves every round; asked again, both processes have the finished run from it."""
    assert [report["saved"] for report in reports] == [SHARED.rounds, 0]
    stored = torch.load(folder / "shared" / "checkpoint.pt", weights_only=True)
    assert stored["history"] == reports[0]["shared"]["history"]
    for report in reports:
        assert torch.equal(report["resumed"]["weights"], report["shared"]["weights"])
        assert report["resumed"]["history"] == report["shared"]["history"]


def test_shares_that_do_not_divide_are_refused(folder: Path, reports: list[dict[str, Any]]) -> None:
    """ValueError on both processes, before any file, for images and for transitions."""
    for report in reports:
        assert "2 processes cannot share 3 images a round and updates of 16 transitions" in report["samples_per_prompt"]
        assert "2 processes cannot share 4 images a round and updates of 3 transitions" in report["batch"]
    assert not (folder / "odd").exists()
