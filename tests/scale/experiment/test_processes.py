"""Two processes, killed twenty times, end with what one process makes without interruption."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from scale.experiment.config import read_config
from scale.experiment.run import sweep
from tests.scale.experiment.fixtures import contents, write_config

pytestmark = pytest.mark.slow

KILLS = 20
METHODS = [
    "base", "mpa", {"method": "mpa", "correct": "resample", "label": "corrected", "batch_size": 6}, "mpa-ls",
    {"method": "msdda", "variances": {"base": 1.0, "colorfulness": 0.5, "jpeg": 2.0}},
    {"method": "code", "candidates": 3, "block": 1},
    {"method": "rgg", "alpha": 0.5, "preferences": [{"colorfulness": 1.0}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def config(files: Path) -> Path:
    """12 cells of 18 images, in 96 batches; those of `corrected` hold the 6 images of a prompt, which compete."""
    return write_config(files, "kills", methods=METHODS, seeds=6)


def launch(root: Path, config: Path, run: Path, processes: int, kills: int) -> dict[str, Any]:
    """What `tests.scale.experiment.ranks` reports."""
    command = [sys.executable, "-m", "tests.scale.experiment.ranks", str(config), str(run)]
    environment = os.environ | {"PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    command += [str(number) for number in (processes, kills, 2026)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_twenty_kills_change_nothing(root: Path, config: Path, tmp_path: Path) -> None:
    """Images byte for byte, records and table but for seconds and memory, and not a file more.

    All kills came while the two processes lived, and most after a file or more had been written. `test_run` has the
    control that the comparison sees what depends on the process.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    sweep(read_config(str(config)), whole)
    report = launch(root, config, killed, 2, KILLS)
    assert (report["killed"], report["ended"]) == (KILLS, [0, 0])
    grown = [0, *report["entries"]]
    assert sum(after > before for before, after in pairwise(grown)) > KILLS / 2
    assert contents(killed) == contents(whole)


def test_launched_processes_share_the_work(root: Path, files: Path, finished: Path, tmp_path: Path) -> None:
    """Started as users do, by torchrun: the same folder as one process's, and one line on standard output."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, "-m", "scale.cli", "sweep", str(write_config(files)), "--out", str(tmp_path), "--json"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout)["made"] == 30
    assert contents(tmp_path) == contents(finished)
