"""Shapes are checked while the tests run: jaxtyping's hook must act before the packages are imported."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
# nothing that the tests do may reach a model hub
os.environ["HF_HUB_OFFLINE"] = "1"
# processes beside each other (`pytest -n 2`) have a core each: more threads would wait for one another
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

hook = install_import_hook(["dbtheory", "toys", "scale", "proofs_check"], "beartype.beartype")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[1]
