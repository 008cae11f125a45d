"""The tiny model and a finished run of the small experiment, made once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scale.experiment.config import Config, read_config
from scale.experiment.run import sweep
from tests.scale.experiment.fixtures import save_model, write_config


@pytest.fixture(scope="package")
def one_thread() -> Iterator[None]:
    """What is compared bit for bit must be computed by as many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def files(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A tiny model and its adapters."""
    return save_model(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="package")
def finished(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the config as it is, by one process, without interruption."""
    run = tmp_path_factory.mktemp("finished") / "run"
    sweep(read_config(str(write_config(files))), run)
    return run


@pytest.fixture
def config(files: Path) -> Config:
    """The small experiment."""
    return read_config(str(write_config(files)))
