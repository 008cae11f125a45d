"""torch.compile, in an interpreter without the tests' checks of shapes: no graph can be made of those."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(root: Path, *options: str) -> None:
    """The tests of compiled.py, without conftest.py."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "--tb=short", *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error"}
    path = "tests/scale/compiled.py"
    done = subprocess.run([*command, path], cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.mark.slow
def test_blends_beside_torch_compile(root: Path) -> None:
    """Every form of torch.compile, in either order: equal to eager, and no graph is made anew on the way."""
    run(root, "-m", "not slow")


@pytest.mark.slow
def test_blends_beside_inductor(root: Path) -> None:
    """The backend that users have gives the same pictures too."""
    run(root, "-m", "slow")
