"""What making images costs: evaluations, rewards, gradients, seconds, memory."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from scale.adapters import denoiser_name, denoiser_of

# the layers that the latents enter by, in the order in which to look: Flux also has a pos_embed, which sees no image
FIRST_LAYERS = ("conv_in", "x_embedder", "img_in", "patch_embed", "pos_embed")
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Ledger:
    """`evaluations`: rows that went through the denoiser (guidance doubles them, m experts make m rows).

    `reward_calls`: images scored in order to steer; a mix of rewards scores an image once. `gradients`: rows sent back
    through the denoiser for a reward's gradient. `seconds`: wall clock. `peak_memory`: bytes, the most that PyTorch
    held on the GPU where there is one; else by how much the process's resident memory rose above what it was.
    """

    evaluations: int = 0
    reward_calls: int = 0
    gradients: int = 0
    seconds: float = 0.0
    peak_memory: int = 0


@contextmanager
def metered(pipe: DiffusionPipeline) -> Iterator[Ledger]:
    """Count what the pipeline does within; seconds and memory are there once it is left, also by an exception.

    Rows are counted at the first layer inside the denoiser, so a blend's are those of its experts. Peaks of memory are
    reset on entry: do not nest.

    Raises:
        ValueError: a denoiser whose first layer is unknown, or a compiled one, whose graph knows no such counting.
    """
    denoiser, ledger = denoiser_of(pipe), Ledger()
    layer = _first_layer(denoiser)
    if getattr(denoiser, "_compiled_call_impl", None) is not None or getattr(pipe, denoiser_name(pipe)) is not denoiser:
        raise ValueError("evaluations of a compiled denoiser cannot be counted; meter it without torch.compile")

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ledger.evaluations += len(next(iter((*args, *kwargs.values()))))

    handle = layer.register_forward_pre_hook(count, with_kwargs=True)
    before, start = _reset_memory(), time.perf_counter()
    try:
        yield ledger
    finally:
        handle.remove()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ledger.seconds = time.perf_counter() - start
        ledger.peak_memory = max(0, _peak_memory() - before)


def _first_layer(denoiser: Any) -> nn.Module:
    for name in FIRST_LAYERS:
        if isinstance(layer := getattr(denoiser, name, None), nn.Module):
            return layer
    raise ValueError(f"{type(denoiser).__name__} has none of {', '.join(FIRST_LAYERS)} to count evaluations at")


def _reset_memory() -> int:
    """Begin to look for a peak; what memory is in use that does not count, in bytes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return 0
    with suppress(OSError):  # elsewhere only the peak of the whole process is known: what stays below it is nothing
        FORGET.write_text("5")  # Linux: the peak is what is resident now
    return _peak_memory()


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
