"""Schedulers as a pipeline's call prepares them, and samples for them."""

from typing import Any

import torch
from torch import Tensor

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SHAPE = (3, 4, 2, 2)


def prepared(kind: type, settings: dict[str, Any], steps: int = 8) -> Any:
    """A scheduler of this kind that is about to take `steps` steps."""
    scheduler = kind(**settings)
    scheduler.set_timesteps(steps)
    return scheduler


def normal(seed: int) -> Tensor:
    """Float64 samples of SHAPE."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
