"""Stacked low-rank products against the definition, layer by layer, and against peft's own mixed batches."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from scale.adapters import load_adapter, lora_layers
from scale.lowrank import is_stacked
from scale.switch import AdapterSwitch
from tests.scale import tiny

NAMES = ("wide", "narrow", "elsewhere")


@pytest.fixture
def pipe(tmp_path: Path):
    """Adapters of ranks 4, 3 and 2 on Linear and Conv2d layers; the last leaves most layers alone."""
    pipe = tiny.sd()
    for i, (name, targets) in enumerate(zip(NAMES, (tiny.MIXED, tiny.MIXED, ("to_k",)), strict=True)):
        file = tiny.save_lora(tiny.sd, tmp_path / name, i, targets, rank=4 - i, alpha=2)
        load_adapter(pipe, file, name)
    return pipe


def delta(layer, name: str) -> Tensor:
    """`s B A` of an adapter at a layer, shaped as its weight: zero where the adapter leaves it alone."""
    weight = layer.base_layer.weight
    if name not in layer.lora_A:
        return torch.zeros_like(weight)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return layer.scaling[name] * (b.flatten(1) @ a.flatten(1)).view_as(weight)


def answer(layer, x: Tensor, change: Tensor) -> Tensor:
    """The layer with its weight changed, by torch's own products."""
    base = layer.base_layer
    if isinstance(base, nn.Linear):
        return nn.functional.linear(x, base.weight + change, base.bias)
    return nn.functional.conv2d(x, base.weight + change, base.bias, base.stride, base.padding)


def inputs(layer, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    base = layer.base_layer
    shape = (rows, 5, base.in_features) if isinstance(base, nn.Linear) else (rows, base.in_channels, 6, 6)
    return torch.randn(shape, generator=generator)


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() < 1e-5 * expected.abs().max())


@pytest.mark.parametrize(
    "rows", [["wide", "narrow", "elsewhere"], ["narrow", "base", "wide", "wide"], ["base", "elsewhere"]]
)
@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_each_run_of_rows_has_its_adapter(pipe, rows: list[str], compiled: bool) -> None:
    """Runs of two rows follow the adapters they name, at every Linear and Conv2d layer, whatever the ranks."""
    switch = AdapterSwitch(pipe.unet, NAMES)
    switch.compiled = compiled
    switch.select(rows)
    kinds = set()
    for layer in lora_layers(pipe.unet):
        x = inputs(layer, 2 * len(rows))
        changes = [delta(layer, name) if name != "base" else torch.zeros(()) for name in rows]
        parts = [answer(layer, x[2 * i : 2 * i + 2], change) for i, change in enumerate(changes)]
        assert close(layer(x), torch.cat(parts))
        kinds.add(type(layer.base_layer))
    assert {kind.__name__ for kind in kinds} >= {"Linear"}
    assert any(isinstance(layer.base_layer, nn.Conv2d) for layer in lora_layers(pipe.unet))


@torch.no_grad()
def test_soups_are_one_changed_weight(pipe) -> None:
    """Two soups of the deltas, one for each run, are weights W + sum c s B A; of the factors, the averaged factors'."""
    switch = AdapterSwitch(pipe.unet, NAMES)
    coefficients = torch.tensor([[0.6, 0.9, -0.3], [0.2, 0.3, 0.5]])
    for layer in lora_layers(pipe.unet):
        x = inputs(layer, 4)
        switch.select_soup(coefficients, "deltas")
        changes = [sum(float(c) * delta(layer, n) for c, n in zip(row, NAMES, strict=True)) for row in coefficients]
        assert close(layer(x), torch.cat([answer(layer, x[:2], changes[0]), answer(layer, x[2:], changes[1])]))
        switch.select_soup(coefficients[:1], "factors")
        assert close(layer(x), answer(layer, x, _averaged_factors(layer, coefficients[0])))


def _averaged_factors(layer, coefficients: Tensor) -> Tensor:
    """`lambda (sum w s B)(sum w A)`, lower ranks filled up with zeros."""
    total = float(coefficients.sum())
    down, up = 0.0, 0.0
    for c, name in zip((coefficients / total).tolist(), NAMES, strict=True):
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight.flatten(1), layer.lora_B[name].weight.flatten(1)
            down = down + c * nn.functional.pad(a, (0, 0, 0, 4 - len(a)))
            up = up + c * layer.scaling[name] * nn.functional.pad(b, (0, 4 - len(a)))
    return total * (up @ down).view_as(layer.base_layer.weight)  # pyright: ignore


@torch.no_grad()
def test_mixed_rows_are_pefts_own(pipe) -> None:
    """peft's mixed batch, which loops over adapters by name, gives the same rows."""
    layers, names = lora_layers(pipe.unet), ["narrow", "__base__", "wide"]
    expected = [layer(inputs(layer, 3), adapter_names=names) for layer in layers]
    switch = AdapterSwitch(pipe.unet, NAMES)
    switch.select(["narrow", "base", "wide"])
    for layer, value in zip(layers, expected, strict=True):
        assert close(layer(inputs(layer, 3)), value)


def test_memory_holds_full_rank_factors_once(pipe) -> None:
    """peft's factors of the largest rank are views of the stacks; after `.to()` the next selection ties them again."""
    switch = AdapterSwitch(pipe.unet, NAMES)
    layer = lora_layers(pipe.unet)[0]
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    switch.select(["wide", "narrow"])
    assert is_stacked(layer, NAMES)
    assert layer.lora_A["wide"].weight.untyped_storage().data_ptr() == layer.stacked_down.untyped_storage().data_ptr()
    after = pipe.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    pipe.unet.to(torch.bfloat16)
    assert not is_stacked(layer, NAMES)
    switch.select(["wide", "narrow"])
    assert is_stacked(layer, NAMES)
    assert layer.stacked_down.dtype == torch.bfloat16


def test_strength_scales_what_the_stacks_add(pipe) -> None:
    """Strength 0 is the base model, 2 twice the deltas."""
    switch = AdapterSwitch(pipe.unet, NAMES)
    layer = lora_layers(pipe.unet)[0]
    x = inputs(layer, 2)
    for strength in (0.0, 2.0):
        switch.strength = strength
        switch.select(["wide", "narrow"])
        parts = [answer(layer, x[i : i + 1], strength * delta(layer, name)) for i, name in enumerate(NAMES[:2])]
        assert close(layer(x), torch.cat(parts))


def test_removed_hooks_leave_pefts_path(pipe) -> None:
    """After `remove` the layers are peft's own again, with the first adapter active."""
    switch = AdapterSwitch(pipe.unet, NAMES)
    switch.select(["wide", "narrow"])
    switch.remove()
    for layer in lora_layers(pipe.unet):
        assert not layer._forward_hooks
        assert layer.active_adapters == ["wide"]
        assert not layer.disable_adapters
