"""The adapters of one LoRA layer, stacked, so that one product serves rows of different adapters.

A layer with weight W and adapters `s_i B_i A_i` answers `(W + sum_i c_i s_i B_i A_i) x`. The stacks are `A (m, r, in)`
(with a kernel's two axes more for Conv2d), `B (m, out, r)` and `s (m,)`; smaller ranks are filled up with zeros, and so
are adapters that leave this layer alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import conv2d


class Factors(NamedTuple):
    """What acts on `g` equal runs of rows: run k gets `B_k diag(gate_k) A_k x`, or `gate B_k A_k x` for a number."""

    down: Float[Tensor, "g r *input"]
    up: Float[Tensor, "g out r"]
    gate: Float[Tensor, "g r"] | float


def stack(layer: Any, names: Sequence[str]) -> None:
    """Give a LoRA layer the stacks of these adapters, as plain attributes, which no file ever holds.

    peft's own factors become views of the stacks wherever their rank is the largest, so that memory holds them once.
    Stacking anew (after `.to()` has parted them) changes no value. The stacks are constants: no gradient reaches the
    factors through them, and a factor of smaller rank that changes later is not seen.
    """
    held = {name: (layer.lora_A[name].weight, layer.lora_B[name].weight) for name in names if name in layer.lora_A}
    down, up = next(iter(held.values()))
    rank = max(a.shape[0] for a, _ in held.values())
    stacked_down = down.new_zeros(len(names), rank, *down.shape[1:], requires_grad=False)
    stacked_up = up.new_zeros(len(names), up.shape[0], rank, requires_grad=False)
    scales = down.new_zeros(len(names), dtype=torch.float32, requires_grad=False)
    for i, name in enumerate(names):
        if name not in held:
            continue
        a, b = held[name]
        stacked_down[i, : a.shape[0]] = a.detach()
        stacked_up[i, :, : a.shape[0]] = b.detach().flatten(1)
        scales[i] = layer.scaling[name]
        if a.shape[0] == rank:
            a.data, b.data = stacked_down[i], stacked_up[i].view(b.shape)
    # one scale for all adapters, where they agree: it then costs no product of its own
    values = {layer.scaling.get(name) for name in names}
    layer.common_scale = values.pop() if len(values) == 1 else None
    layer.stacked_down, layer.stacked_up, layer.scales = stacked_down, stacked_up, scales


def is_stacked(layer: Any, names: Sequence[str]) -> bool:
    """Whether the layer's stacks still share their memory with peft's factors of full rank."""
    if not hasattr(layer, "stacked_down"):
        return False
    stacked = layer.stacked_down
    return all(
        layer.lora_A[name].weight.data_ptr() == stacked[i].data_ptr()
        for i, name in enumerate(names)
        if name in layer.lora_A and layer.lora_A[name].weight.shape[0] == stacked.shape[1]
    )


def chosen(layer: Any, adapters: Int64[Tensor, " g"] | None, amounts: Float[Tensor, " g"] | float) -> Factors:
    """One adapter a run, times its amount, 0 for the base model.

    `adapters` indexes the stacks, None is all of them in order; one number is the amount of every run.
    """
    down, up, scales = layer.stacked_down, layer.stacked_up, layer.scales
    if adapters is not None:
        down, up = down[adapters], up[adapters]
    if isinstance(amounts, float) and layer.common_scale is not None:
        return Factors(down, up, amounts * layer.common_scale)
    gate = amounts * (scales if adapters is None else scales[adapters])
    return Factors(down, up, gate.unsqueeze(1).expand(-1, down.shape[1]))


def soup(layer: Any, coefficients: Float[Tensor, "g m"]) -> Factors:
    """`sum_i c_i s_i B_i A_i` for each run: the soup of the deltas, of rank m r."""
    g, (m, out, r) = len(coefficients), layer.stacked_up.shape
    down = layer.stacked_down.flatten(0, 1)
    up = layer.stacked_up.transpose(0, 1).reshape(out, m * r)
    gate = (coefficients * layer.scales).repeat_interleave(r, 1)
    return Factors(down.expand(g, *down.shape), up.expand(g, out, m * r), gate)


def factor_soup(layer: Any, weights: Float[Tensor, "g m"], strength: Float[Tensor, " g"]) -> Factors:
    """`strength (sum_i w_i s_i B_i) (sum_i w_i A_i)` for each run: the reference's soup, which averages the factors."""
    down = torch.tensordot(weights.to(layer.stacked_down), layer.stacked_down, 1)
    up = torch.tensordot((weights * layer.scales).to(layer.stacked_up), layer.stacked_up, 1)
    return Factors(down, up, strength.unsqueeze(1).expand(-1, down.shape[1]))


def add_deltas(base: nn.Linear | nn.Conv2d, x: Tensor, result: Tensor, factors: Factors) -> Tensor:
    """`result`, which is `base(x)`, plus the factors' deltas; the rows of x are `g` runs of equal length."""
    # autocast computes the base's result in another dtype than its parameters'
    down, up, gate = factors.down.to(result.dtype), factors.up.to(result.dtype), factors.gate
    x = x.to(result.dtype)
    if isinstance(base, nn.Conv2d):
        return _add_conv_deltas(base, x, result, down, up, gate)
    hidden = torch.bmm(x.reshape(len(up), -1, x.shape[-1]), down.mT)
    if isinstance(gate, Tensor):
        hidden, gate = hidden.mul_(gate.unsqueeze(1)), 1.0
    # one pass over the result: the sum is part of the product
    return result.reshape(len(up), -1, result.shape[-1]).baddbmm_(hidden, up.mT, alpha=gate).view(result.shape)


def _add_conv_deltas(
    base: nn.Conv2d, x: Tensor, result: Tensor, down: Tensor, up: Tensor, gate: Tensor | float
) -> Tensor:
    how = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}
    deltas = []
    for k, part in enumerate(x.chunk(len(up))):
        scale = gate[k].to(x.dtype).view(-1, 1, 1, 1) if isinstance(gate, Tensor) else gate
        deltas.append(conv2d(part, down[k] * scale, **how))
    deltas = [conv2d(hidden, b[..., None, None]) for hidden, b in zip(deltas, up, strict=True)]
    return result.add_(torch.cat(deltas) if len(deltas) > 1 else deltas[0])
