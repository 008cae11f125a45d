"""One LoRA layer whose rows belong to several adapters: our stacked products beside peft's and beside a loop."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benches.scale_contestants import Task
from benches.scale_models import ARCHITECTURES, TOKENS
from benches.timing import Timing, take_turns
from scale.switch import AdapterSwitch

OURS, BARE = "stacked", "no adapter"


@dataclass(frozen=True)
class Shape:
    """A projection of a model's attention: features in and out, and the tokens of one row."""

    what: str
    inputs: int
    outputs: int
    tokens: int


def shapes(model: str, latents: int) -> list[Shape]:
    """The first self-attention, the innermost, and the projection of the text, for latents of this side."""
    channels, width = ARCHITECTURES[model].unet["block_out_channels"], ARCHITECTURES[model].unet["cross_attention_dim"]
    first = next(k for k, block in enumerate(ARCHITECTURES[model].unet["down_block_types"]) if "CrossAttn" in block)
    outer, inner = channels[first], channels[-1]
    return [
        Shape("self, first", outer, outer, (latents >> first) ** 2),
        Shape("self, inner", inner, inner, (latents >> len(channels) - 1) ** 2),
        Shape("text", width, inner, TOKENS),
    ]


def layer(shape: Shape, adapters: int, rank: int, dtype: torch.dtype, device: str) -> Any:
    """A module whose one `projection` carries random adapters `a0`, `a1`, ..."""
    torch.manual_seed(0)
    module: Any = nn.Module()
    module.projection = nn.Linear(shape.inputs, shape.outputs, bias=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for k in range(adapters):
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["projection"], init_lora_weights=False)
            inject_adapter_in_model(config, module, adapter_name=f"a{k}")
    return module.eval().requires_grad_(False).to(device, dtype)


def candidates(
    shape: Shape, adapters: int, rank: int, dtype: torch.dtype, device: str, rows: int = 2
) -> dict[str, Callable[[], Tensor]]:
    """By name, ways to the layer's answer, `(adapters * rows, tokens, out)`, to `rows` rows of each adapter.

    `no adapter` is the bare product, which all of them contain.
    """
    ours, peft, loop = (layer(shape, adapters, rank, dtype, device) for _ in range(3))
    names = list(ours.projection.lora_A)
    x = torch.randn(adapters * rows, shape.tokens, shape.inputs, generator=torch.Generator().manual_seed(1))
    x = x.to(device, dtype)
    switch = AdapterSwitch(ours, names)
    switch.select(names)
    assignment = [name for name in names for _ in range(rows)]

    def looped() -> Tensor:
        projection: Any = loop.projection
        result = projection.base_layer(x)
        for name, given, part in zip(names, x.split(rows), result.split(rows), strict=True):
            part += projection.lora_B[name](projection.lora_A[name](given)) * projection.scaling[name]
        return result

    ways: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: ours.projection(x),
        "peft's mixed batch": lambda: peft.projection(x, adapter_names=assignment),
        "loop over adapters": looped,
        BARE: lambda: peft.projection.base_layer(x),
    }
    return {name: _finished(way, device) for name, way in ways.items()}


def measure(task: Task, adapters: int, rank: int, repeats: int, calls: int = 20) -> dict[Shape, dict[str, Timing]]:
    """Of every shape of a task's model, the time of one call of every candidate: means of `calls`, in turns."""
    timings = {}
    for shape in shapes(task.model, task.latents):
        ways = candidates(shape, adapters, rank, task.torch_dtype, task.device, task.rows)
        taken = take_turns({name: lambda f=f: [f() for _ in range(calls)] for name, f in ways.items()}, repeats)
        timings[shape] = {name: Timing(timing.wall / calls, timing.cpu / calls) for name, timing in taken.items()}
    return timings


def _finished(way: Callable[[], Tensor], device: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            result = way()
        if device != "cpu":
            torch.cuda.synchronize()
        return result

    return run
