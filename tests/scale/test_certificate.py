"""The certificate of a pipeline's images, and resampling by it, against plain loops and against the core's sampler."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor

from dbtheory import MeanBlend, Preference, sample
from dbtheory.correct import Trace
from dbtheory.random import uniform
from dbtheory.resampling import effective_size, systematic
from dbtheory.schedule import VPDiscrete
from scale import attach
from scale.certificate import THRESHOLD, groups_of, relative_distance
from scale.trajectory import phases
from tests.scale import tiny

STEPS = 6
COEFFICIENTS = {"base": -0.2, "style": 0.36, "shape": 0.84}
PREFERENCE = Preference({"style": 0.3, "shape": 0.7}, kl_scale=1.2)
HALF = Preference({"style": 0.5, "shape": 0.5})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "style": tiny.save_lora(tiny.sd, folder / "style", 1),
        "shape": tiny.save_lora(tiny.sd, folder / "shape", 2, tiny.MIXED, rank=3),
    }


def pipeline():
    """Tiny SD whose DDIM ends at the data itself, as the core's grids do."""
    pipe = tiny.sd()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    return pipe


def run(pipe, prompts: list[str], seeds: list[int], **options) -> Tensor:
    settings = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "eta": 1.0, "output_type": "latent"} | options
    return pipe(prompts, generator=[torch.Generator().manual_seed(seed) for seed in seeds], **settings).images


def plain_loop(files: dict, prompts: list[str], seeds: list[int], coefficients: dict, guidance: float, resample: bool):
    """DDIM over separate models, guided one by one, weighed by eps alone: latents, certificate, resampled steps."""
    models = {"base": pipeline().unet} | {name: tiny.sd() for name in files}
    for name, path in files.items():
        models[name].load_lora_weights(path)
        models[name] = models[name].unet.eval()
    pipe = pipeline()
    text, empty = pipe.encode_prompt(prompts, "cpu", 1, True, [""] * len(prompts))
    schedule, scheduler = VPDiscrete(), pipe.scheduler
    scheduler.set_timesteps(STEPS)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    draw = lambda: torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generators])  # noqa: E731
    x = draw()
    phase = phases(x)
    path, log_weights = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    resampled = []
    for k, timestep in enumerate(scheduler.timesteps):
        eps = []
        for name in coefficients:
            unconditional, conditional = models[name](x, timestep, empty)[0], models[name](x, timestep, text)[0]
            eps.append(unconditional + guidance * (conditional - unconditional))
        mean = sum(c * e for c, e in zip(coefficients.values(), eps, strict=True))
        spread = sum(
            c * (e - mean).double().square().flatten(1).sum(1) for c, e in zip(coefficients.values(), eps, strict=True)
        )
        t = (float(timestep) + 1) / 1000
        t_next = (float(scheduler.timesteps[k + 1]) + 1) / 1000 if k + 1 < STEPS else 0.0
        gained = 0.5 * schedule.diffusion_squared(t) / schedule.variance(t) * spread * (t - t_next)
        path, log_weights = path + gained, log_weights - gained
        if resample and k + 1 < STEPS and effective_size(log_weights) < THRESHOLD:
            kept = systematic(log_weights, uniform(phase[:1], -1000 - k))
            x, mean, path, phase = x[kept], mean[kept], path[kept], phase[kept]
            log_weights = torch.zeros_like(log_weights)
            resampled.append(k)
        x = scheduler.step(mean, timestep, x, eta=1.0, variance_noise=draw(), return_dict=False)[0]
    return x, path, log_weights, resampled


@pytest.mark.parametrize("resample", [False, True])
@torch.no_grad()
def test_certificate_and_resampling_are_a_plain_loop(files: dict, resample: bool) -> None:
    """Guided images of one prompt: latents, certificate, weights and resampled steps equal a loop over models, 1e-4."""
    seeds, prompts = [1, 2, 3, 4], ["a red circle"] * 4
    coefficients = {"style": 0.5, "shape": 0.5}
    pipe = pipeline()
    knob = attach(pipe, files, HALF, correct="resample" if resample else None)
    images = run(pipe, prompts, seeds)
    x, path, log_weights, resampled = plain_loop(files, prompts, seeds, coefficients, 3.0, resample)
    certificate = knob.certificate
    assert certificate is not None
    assert certificate.resamplings == ({0: resampled} if resampled else {})
    assert bool(resampled) is resample
    torch.testing.assert_close(images, x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))
    torch.testing.assert_close(certificate.path, path, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(certificate.log_weights, log_weights, rtol=1e-3, atol=1e-4)
    assert certificate.running.shape == (STEPS, 4)
    assert torch.equal(certificate.running[-1], certificate.path)
    assert (certificate.running.diff(dim=0) > 0).all()
    torch.testing.assert_close(
        certificate.ess, torch.full((4,), effective_size(log_weights)).double(), rtol=1e-2, atol=0
    )


@torch.no_grad()
def test_certificate_is_the_cores(files: dict) -> None:
    """`dbtheory.sample` over the same experts, with its own DDIM and its own schedule, leaves the same certificate."""
    pipe = pipeline()
    knob = attach(pipe, files, PREFERENCE)
    run(pipe, ["a red circle"], [3], guidance_scale=1.0)
    text, _ = pipe.encode_prompt(["a red circle"], "cpu", 1, False)
    generator = torch.Generator().manual_seed(3)
    draws = [torch.randn(1, 4, 8, 8, generator=generator) for _ in range(STEPS + 1)]
    grid = torch.cat(((pipe.scheduler.timesteps.to(torch.float64) + 1) / 1000, torch.zeros(1, dtype=torch.float64)))
    trace = Trace()
    sample(
        knob.experts.bind(encoder_hidden_states=text), MeanBlend(PREFERENCE), 1, STEPS, method="ddim", trace=trace,
        x_T=draws[0], noise=torch.stack(draws[1:]), phase=torch.zeros(1, dtype=torch.float64), grid=grid,
    )  # fmt: skip
    assert knob.certificate is not None
    torch.testing.assert_close(knob.certificate.path, trace.certificate, rtol=1e-4, atol=0.0)


def test_one_expert_agrees_with_itself(files: dict) -> None:
    """One-hot preferences have certificate 0, disagreement 0 and equal weights; a blend has not (the control)."""
    pipe = pipeline()
    knob = attach(pipe, files, Preference({"style": 1.0, "shape": 0.0}))
    run(pipe, ["a red circle"] * 2, [1, 2])
    (first, _) = knob.certificate.as_dicts()  # pyright: ignore
    assert first == {"certificate": 0.0, "disagreement": 0.0, "ess": 1.0, "log_weight": 0.0, "resampled": []}
    knob.preference = HALF
    run(pipe, ["a red circle"] * 2, [1, 2])
    (first, _) = knob.certificate.as_dicts()  # pyright: ignore
    assert first["certificate"] > 1
    assert first["disagreement"] > 0.01
    assert first["ess"] < 1


def test_an_image_has_its_certificate_in_any_batch(files: dict) -> None:
    """An image's certificate is its own; only the effective size speaks of the images beside it."""
    pipe = pipeline()
    knob = attach(pipe, files, PREFERENCE)
    run(pipe, ["a red circle", "a blue heart"], [1, 2])
    together = knob.certificate.path  # pyright: ignore
    run(pipe, ["a blue heart"], [2])
    torch.testing.assert_close(knob.certificate.path, together[1:], rtol=1e-4, atol=0.0)  # pyright: ignore
    assert float(knob.certificate.ess) == 1  # pyright: ignore


def test_images_group_by_prompt_and_by_preference(files: dict) -> None:
    """Only images of one prompt and one preference share weights: equal ones first met give the group its number."""
    pipe = pipeline()
    knob = attach(pipe, files, HALF)
    run(pipe, ["a red circle", "a blue heart", "a red circle"], [1, 2, 3])
    assert knob.certificate.groups.tolist() == [0, 1, 0]  # pyright: ignore
    w = torch.tensor([0.5, 0.5, 0.5, 0.9])
    knob.preference = Preference({"style": w, "shape": 1 - w})
    run(pipe, ["a red circle"] * 4, [1, 2, 3, 4])
    assert knob.certificate.groups.tolist() == [0, 0, 0, 3]  # pyright: ignore
    assert groups_of([], [], 3).tolist() == [0, 0, 0]


def test_relative_distance_by_hand() -> None:
    """One pixel, predictions 1 and 3, blend 2 (equal weights): squared distances 1 and 1 over 4."""
    predictions, blended = torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([[2.0]])
    assert relative_distance(predictions, blended, [0.5, 0.5]).tolist() == [0.25]


@pytest.mark.parametrize("method", ["mpa-ls", "rs", "rs-factors"])
def test_one_evaluation_a_step_has_no_certificate(files: dict, method: str) -> None:
    """Where one model is evaluated nothing is known of the others: None, not zero."""
    pipe = pipeline()
    knob = attach(pipe, files, HALF, method=method)
    run(pipe, ["a red circle"], [1])
    assert knob.certificate is None


def test_resampling_is_refused_where_it_cannot_be(files: dict) -> None:
    """Schedulers without noise, eta = 0, methods that see one model a step: a ValueError that names the remedy."""
    pipe = pipeline()
    with pytest.raises(ValueError, match="use mpa"):
        attach(pipe, files, HALF, method="mpa-ls", correct="resample")
    with pytest.raises(ValueError, match="correct must be"):
        attach(pipe, files, HALF, correct="always")
    attach(pipe, files, HALF, correct="resample")
    with pytest.raises(ValueError, match="eta > 0"):
        run(pipe, ["a red circle"], [1], eta=0.0)
    run(pipe, ["a red circle"], [1])
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="has no noise of its own"):
        run(pipe, ["a red circle"], [1])
