"""Rewarded soups of a pipeline against diffusers' own weighted adapters, and against first principles."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dbtheory import ExactExperts, GaussianMixture, LinearReward, Preference, VPLinear
from dbtheory.blend import Step
from scale import attach
from scale.soup import SoupBlend
from tests.scale import tiny

PROMPTS = ["a red circle", "a blue heart"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "style": tiny.save_lora(tiny.sd, folder / "style", 1, tiny.MIXED),
        "shape": tiny.save_lora(tiny.sd, folder / "shape", 2, tiny.MIXED),
    }


def run(pipe, **options) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "eta": 1.0, "output_type": "latent"} | options
    return pipe(PROMPTS, generator=generators, **settings).images


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() < 1e-4 * expected.abs().max())


def test_rs_is_diffusers_weighted_adapters(files: dict) -> None:
    """`rs` at w = (.3, .7), lambda = 1.2 is `set_adapters(["style", "shape"], [.36, .84])`."""
    pipe, own = tiny.sd(), tiny.sd()
    attach(pipe, files, Preference({"style": 0.3, "shape": 0.7}, kl_scale=1.2), method="rs")
    with warnings.catch_warnings(action="ignore"):  # peft's of a second adapter
        for name, file in files.items():
            own.load_lora_weights(file, adapter_name=name)
    own.unet.eval()
    own.set_adapters(list(files), [0.36, 0.84])
    assert close(run(pipe), run(own))


def test_rs_factors_is_one_file_of_averaged_factors(files: dict, tmp_path: Path) -> None:
    """`rs-factors` at lambda = 1 is diffusers' own pipeline with a file whose tensors are averages; `rs` is not."""
    tables = {name: load_file(path / "pytorch_lora_weights.safetensors") for name, path in files.items()}
    averaged = {key: 0.3 * tables["style"][key] + 0.7 * tables["shape"][key] for key in tables["style"]}
    save_file(averaged, tmp_path / "pytorch_lora_weights.safetensors")
    own = tiny.sd()
    own.load_lora_weights(tmp_path)
    own.unet.eval()
    expected = run(own)
    for method, equal in (("rs-factors", True), ("rs", False)):
        pipe = tiny.sd()
        attach(pipe, files, Preference({"style": 0.3, "shape": 0.7}), method=method)
        assert close(run(pipe), expected) is equal


@pytest.mark.parametrize("method", ["rs", "rs-factors"])
def test_one_hot_soups_are_single_experts_bit_for_bit(files: dict, method: str) -> None:
    """All weight on one adapter is that adapter's own pipeline; lambda = 0 is the base's."""
    pipe = tiny.sd()
    knob = attach(pipe, files, Preference({"style": 0.0, "shape": 1.0}), method=method)
    own = tiny.sd()
    own.load_lora_weights(files["shape"])
    own.unet.eval()
    assert torch.equal(run(pipe), run(own))
    knob.preference = Preference({"style": 0.5, "shape": 0.5}, kl_scale=0.0)
    assert torch.equal(run(pipe), run(tiny.sd()))


@pytest.mark.parametrize("method", ["rs", "rs-factors"])
def test_each_image_has_its_own_soup(files: dict, method: str) -> None:
    """One preference an image, under guidance, is one call a preference."""
    pipe = tiny.sd()
    w = torch.tensor([0.2, 0.9])
    knob = attach(pipe, files, Preference({"style": w, "shape": 1 - w}, torch.tensor([1.0, 0.5])), method=method)
    together = run(pipe)
    for i, scale in enumerate((1.0, 0.5)):
        knob.preference = Preference({"style": float(w[i]), "shape": 1 - float(w[i])}, scale)
        assert close(together[i], run(pipe)[i])


def test_only_adapters_can_be_averaged() -> None:
    """Exact experts have no parameters: a ValueError, and not a blend of predictions under another name."""
    prior = GaussianMixture(torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1))
    experts = ExactExperts(prior, {"r": LinearReward(torch.ones(1))}, 1.0, VPLinear())
    with pytest.raises(ValueError, match="averages adapters"):
        SoupBlend(Preference({"r": 1.0}))(experts, torch.zeros(1, 1), 0.5, Step(0, 1, 0.5, 0.0, torch.zeros(1)))
    with pytest.raises(ValueError, match="average must be"):
        SoupBlend(Preference({"r": 1.0}), "files")


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_with_linear_denoisers_a_soup_is_the_blend(guidance: float, tmp_path: Path) -> None:
    """Where only the last layer has adapters, predictions are linear in the parameters, and `rs` equals DB-MPA exactly.

    `rs-factors` does not; and neither does `rs` where other layers have adapters too.
    """
    last = {name: tiny.save_lora(tiny.sd, tmp_path / name, i, ("conv_out",)) for i, name in enumerate("ab")}
    mixed = {name: tiny.save_lora(tiny.sd, tmp_path / f"mixed-{name}", i, tiny.MIXED) for i, name in enumerate("ab")}
    preference = Preference({"a": 0.3, "b": 0.7}, kl_scale=1.2)

    def images(files: dict[str, Path], method: str) -> Tensor:
        pipe = tiny.sd()
        attach(pipe, files, preference, method=method)
        return run(pipe, guidance_scale=guidance)

    blend = images(last, "mpa")
    assert not close(blend, run(tiny.sd(), guidance_scale=guidance))
    assert close(images(last, "rs"), blend)
    assert not close(images(last, "rs-factors"), blend)
    assert not close(images(mixed, "rs"), images(mixed, "mpa"))
