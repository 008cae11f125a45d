"""The turned adapter: the same model and the same soup of products, another soup of factors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dbtheory import Preference
from scale import attach, mini
from scale.mini import turn
from scale.pipeline import open_pipeline

SHIPPED = mini.ADAPTERS / "colorfulness" / turn.FILE


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return load_file(SHIPPED)


def products(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """B A of every layer, (out, in ...) flattened to a matrix, in float64."""
    downs = {name: tensor for name, tensor in tensors.items() if turn.DOWN in name}
    return {
        name: tensors[name.replace(turn.DOWN, turn.UP)].double().flatten(1) @ down.double().flatten(1)
        for name, down in downs.items()
    }


def test_it_is_the_same_adapter_in_other_factors(tensors: dict[str, Tensor]) -> None:
    """Every product stays to half precision; the factors' rows are orthogonal mixes, far from what they were."""
    made = turn.turned(tensors, torch.Generator().manual_seed(0))
    assert made.keys() == tensors.keys()
    before = products(tensors)
    for name, product in products(made).items():
        assert (product - before[name]).abs().max() < 2e-3 * before[name].abs().max()
        old, new = (table[name].double().flatten(1) for table in (tensors, made))
        mix = new @ torch.linalg.pinv(old)
        torch.testing.assert_close(mix @ mix.mT, torch.eye(len(mix)).double(), atol=2e-2, rtol=0)
    apart = [(made[name] - tensors[name]).norm() / tensors[name].norm() for name in tensors]
    assert torch.stack(apart).mean() > 1


def test_the_shipped_one_is_what_the_command_writes(tmp_path: Path) -> None:
    turn.main(turn.Turn(out=tmp_path))
    shipped = load_file(mini.ADAPTERS / "colorfulness-turned" / turn.FILE)
    for name, tensor in load_file(tmp_path / turn.FILE).items():
        torch.testing.assert_close(tensor, shipped[name], atol=2e-3, rtol=2e-3)  # QR may differ in bits between CPUs


@pytest.mark.parametrize(("method", "equal"), [("mpa", True), ("rs", True), ("rs-factors", False)])
def test_only_the_soup_of_factors_sees_the_turn(
    method: str, equal: bool, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    """In float32 the latents of one image agree to 1e-3 of their change from the base model's, or are far apart."""
    plain, other = tmp_path / "plain", tmp_path / "turned"
    for folder, table in ((plain, tensors), (other, turn.turned(_float(tensors), torch.Generator().manual_seed(0)))):
        folder.mkdir()
        save_file(_float(table), folder / turn.FILE)

    def latents(method: str, folder: Path) -> Tensor:
        pipe = open_pipeline(mini.MODEL)
        pipe.set_progress_bar_config(disable=True)
        experts = {"alignment": mini.ADAPTERS / "alignment", "colorfulness": folder}
        attach(pipe, experts, Preference({"alignment": 0.5, "colorfulness": 0.5}), method=method)
        return pipe(
            "a red star", 64, 64, 3, guidance_scale=1, output_type="latent", generator=torch.Generator().manual_seed(0)
        ).images

    moved = (latents(method, plain) - latents("base", plain)).norm()
    apart = (latents(method, other) - latents(method, plain)).norm() / moved
    assert bool(apart < 1e-3) is equal
    if not equal:
        assert apart > 0.1


def _float(table: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in table.items()}
