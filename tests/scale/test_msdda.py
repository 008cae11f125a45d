"""MSDDA on a pipeline: the fused mean and the fused noise, against a plain loop over models."""

import logging
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from torch import Tensor

from dbtheory import Preference
from scale import attach
from tests.scale import tiny

WEIGHTS = {"style": 0.3, "shape": 0.7}
VARIANCES = {"base": 1.0, "style": 0.5, "shape": 2.0}
# c_i / s_i^2 = 0.6 and 0.35, in all L = 0.95: shares of the mean, and the noise's variance 1/L
SHARES, NOISE = {"style": 0.6 / 0.95, "shape": 0.35 / 0.95}, 0.95**-0.5


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: tiny.save_lora(tiny.sd, folder / name, seed) for seed, name in enumerate(WEIGHTS)}


def run(pipe, **options) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"} | options
    return pipe(["a red circle", "a blue heart"], generator=generators, **settings).images


@pytest.mark.parametrize(
    ("scheduler", "eta"),
    [(DDIMScheduler, 1.0), (DDIMScheduler, 0.4), (DDPMScheduler, 0.0), (EulerAncestralDiscreteScheduler, 0.0)],
)
@pytest.mark.parametrize("variances", [VARIANCES, dict.fromkeys(VARIANCES, 1.0)])
def test_msdda_fuses_mean_and_noise(
    files: dict, scheduler: type, eta: float, variances: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models averaged by their precisions, noise drawn 0.95^-1/2 times as large; at equal variances plain DB-MPA."""
    pipe, reference = tiny.sd(), tiny.sd()
    attach(pipe, files, Preference(WEIGHTS), method="msdda", variances=variances)
    models = {name: tiny.sd() for name in files}
    for name, file in files.items():
        models[name].load_lora_weights(file)
        models[name].unet.eval()
    equal = variances != VARIANCES
    shares, noise = (WEIGHTS, 1.0) if equal else (SHARES, NOISE)

    def averaged(*args, **kwargs) -> tuple[Tensor]:
        return (sum(c * models[name].unet(*args, **kwargs)[0] for name, c in shares.items()),)  # pyright: ignore

    reference.unet.forward = averaged
    for each in (pipe, reference):
        each.scheduler = scheduler.from_config(each.scheduler.config)
    blended = run(pipe, eta=eta)
    # the plain loop's own source of noise, scaled for this scheduler alone
    namespace = scheduler.step.__globals__
    draw = namespace["randn_tensor"]
    monkeypatch.setitem(namespace, "randn_tensor", lambda *args, **kwargs: noise * draw(*args, **kwargs))
    expected = run(reference, eta=eta)
    assert (blended - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_scheduler_has_its_own_step_again_after_detach(files: dict) -> None:
    """The shaped noise is the blend's alone: detached, the pipeline draws what it always drew."""
    pipe = tiny.sd()
    before = run(pipe, eta=1.0)
    knob = attach(pipe, files, Preference(WEIGHTS), method="msdda", variances=VARIANCES)
    assert not torch.allclose(run(pipe, eta=1.0), before)
    knob.detach()
    assert "step" not in vars(pipe.scheduler)
    assert torch.equal(run(pipe, eta=1.0), before)


def test_a_scheduler_without_noise_is_refused(files: dict) -> None:
    """Deterministic steps have no noise to shape: DDIM at eta = 0, and Euler, say so at the first step."""
    pipe = tiny.sd()
    attach(pipe, files, Preference(WEIGHTS), method="msdda", variances=VARIANCES)
    with pytest.raises(ValueError, match="msdda shapes the noise"):
        run(pipe, eta=0.0)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="has no noise of its own"):
        run(pipe)


def test_variances_come_from_the_adapters_cards(files: dict, caplog: pytest.LogCaptureFixture) -> None:
    """A card's step_variance is used, 1 where a card is silent; without any, msdda is DB-MPA and says so."""
    with caplog.at_level(logging.WARNING):
        pipe = tiny.sd()
        attach(pipe, files, Preference(WEIGHTS), method="msdda")
    assert "msdda is DB-MPA here" in caplog.text
    plain = tiny.sd()
    attach(plain, files, Preference(WEIGHTS))
    assert torch.equal(run(pipe, eta=1.0), run(plain, eta=1.0))
    card = files["shape"] / "README.md"
    card.write_text("---\nstep_variance: 2.0\n---\n")
    try:
        stated, told = tiny.sd(), tiny.sd()
        attach(stated, files, Preference(WEIGHTS), method="msdda")
        attach(told, files, Preference(WEIGHTS), method="msdda", variances={"base": 1.0, "style": 1.0, "shape": 2.0})
        assert torch.equal(run(stated, eta=1.0), run(told, eta=1.0))
        assert not torch.equal(run(stated, eta=1.0), run(plain, eta=1.0))
    finally:
        card.unlink()
