"""What the pipeline that calls a denoiser does with its answer."""

import sys
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import unwrap_module
from jaxtyping import Float
from torch import Tensor, nn

from scale.adapters.denoiser import DENOISERS


def calling_pipeline(denoiser: nn.Module) -> Any | None:
    """The pipeline whose call is running: pipelines may share a denoiser, and only their schedulers tell the step.

    A denoiser is told neither, so this looks up the stack. None inside a loop that is no pipeline's.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        # not by its `components`, which diffusers works out anew at each look
        parts = (getattr(caller, name, None) for name in DENOISERS) if isinstance(caller, DiffusionPipeline) else ()
        if any(part is not None and unwrap_module(part) is denoiser for part in parts):
            return caller
        frame = frame.f_back
    return None


def rows_per_image(pipe: Any | None, phase: Float[Tensor, " rows"]) -> int:
    """How often the call's rows, told by their `phase`, hold each image: guidance lays all images out once more.

    1 outside of pipelines. 2 under classifier-free guidance; 3 and 4 where a pipeline guides by a picture too.
    """
    # pipelines that were never called have no guidance scale yet, and others know none
    if not getattr(pipe, "do_classifier_free_guidance", False):
        return 1
    repeats = (k for k in (2, 3, 4) if len(phase) % k == 0 and torch.equal(phase, phase[: len(phase) // k].repeat(k)))
    return next(repeats, 1)


def guided(predictions: Float[Tensor, "m rows *event"], rows: int, pipe: Any) -> Float[Tensor, "m n *event"]:
    """The predictions that steer the images, in float32: `uncond + guidance (cond - uncond)` of two rows an image."""
    predictions = predictions.float()
    if rows == 1:
        return predictions
    unconditional, conditional = predictions.chunk(2, 1)
    return unconditional + pipe.guidance_scale * (conditional - unconditional)


def is_compiled(denoiser: nn.Module, called: nn.Module) -> bool:
    """Whether torch.compile acts on the denoiser (`called` is what the pipeline calls) or on any part of it."""
    return called is not denoiser or any(part._compiled_call_impl is not None for part in denoiser.modules())
