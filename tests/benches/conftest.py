"""What every test of a bench needs."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """What a bench sets for its process is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
