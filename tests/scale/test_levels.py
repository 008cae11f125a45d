"""What is read off diffusers' schedulers, against what they do: their noising, their steps, their pipelines' calls."""

import inspect
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from dbtheory import RectifiedFlow, VPTabulated
from dbtheory.parametrization import convert
from scale.adapters import denoiser_of
from scale.levels import parametrization_of, schedule_of, times_of, timestep_of, told_timesteps
from tests.scale import tiny
from tests.scale.schedulers import FLOW, SD, normal, prepared


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_levels_are_those_of_the_schedulers_own_noising(kind: type, beta_schedule: str, spacing: str) -> None:
    """`add_noise` of data alone is alpha at `times_of`, of noise alone sigma."""
    scheduler = prepared(kind, {"beta_schedule": beta_schedule, "timestep_spacing": spacing})
    schedule, times, one = schedule_of(scheduler), times_of(scheduler), torch.ones(8, 1, dtype=torch.float64)
    assert isinstance(schedule, VPTabulated)
    assert times.dtype == torch.float64
    alpha = scheduler.add_noise(one, 0 * one, scheduler.timesteps)[:, 0]
    sigma = scheduler.add_noise(0 * one, one, scheduler.timesteps)[:, 0]
    torch.testing.assert_close(schedule.alpha(times), alpha, rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.sigma(times), sigma, rtol=1e-9, atol=0)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler])
def test_levels_are_those_of_the_schedulers_sigmas(kind: type, karras: bool) -> None:
    """sigma/alpha at `times_of` is the scheduler's sigma, at float timesteps too, which it interpolates otherwise."""
    scheduler = prepared(kind, {**SD, "use_karras_sigmas": karras})
    schedule, times = schedule_of(scheduler), times_of(scheduler)
    assert schedule is not None
    assert bool((times.diff() <= 0).all())
    ratio = schedule.sigma(times) / schedule.alpha(times)
    torch.testing.assert_close(ratio, scheduler.sigmas[: len(times)].double(), rtol=1e-3 if karras else 1e-4, atol=0)


def test_a_flow_is_scaled_as_diffusers_scales_it() -> None:
    """`scale_noise` of data and of noise alone are 1 - t and t; the first entry is 1, where g^2 diverges, less 1e-6."""
    for settings in ({}, {"shift": 3.0}, {"use_karras_sigmas": True}):
        scheduler = prepared(FlowMatchEulerDiscreteScheduler, settings)
        times, one = times_of(scheduler), torch.ones(8, 1, dtype=torch.float64)
        assert schedule_of(scheduler) == RectifiedFlow()
        assert float(times[0]) == 1 - 1e-6
        noise = scheduler.scale_noise(0 * one, scheduler.timesteps, one)[:, 0]
        data = scheduler.scale_noise(one, scheduler.timesteps, 0 * one)[:, 0]
        torch.testing.assert_close(times, noise.clamp_max(1 - 1e-6), rtol=0, atol=0)
        torch.testing.assert_close(RectifiedFlow().alpha(times), data.clamp_min(1e-6), rtol=0, atol=1e-15)
        assert bool(torch.isfinite(RectifiedFlow().diffusion_squared(times)).all())


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_flow_sigmas_of_other_schedulers(kind: type) -> None:
    """With `use_flow_sigmas` the levels are sigma, though the timesteps are cut to whole numbers."""
    scheduler = prepared(kind, FLOW)
    assert not scheduler.timesteps.is_floating_point()
    assert schedule_of(scheduler) == RectifiedFlow()
    torch.testing.assert_close(times_of(scheduler), scheduler.sigmas[:8].double().clamp_max(1 - 1e-6))


def test_heun_evaluates_twice_at_each_level() -> None:
    """Its sigmas and timesteps are paired up alike."""
    scheduler = prepared(FlowMatchHeunDiscreteScheduler, {"shift": 3.0})
    expected = (scheduler.timesteps.double() / 1000).clamp_max(1 - 1e-6)
    torch.testing.assert_close(times_of(scheduler), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "scheduler",
    [
        prepared(EDMEulerScheduler, {}),
        prepared(EulerDiscreteScheduler, {"timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0}),
        prepared(FlowMatchEulerDiscreteScheduler, {"invert_sigmas": True}),
    ],
    ids=["EDM", "continuous", "inverted"],
)
def test_unknown_levels(scheduler: Any) -> None:
    """No schedule, times that only order the steps, and no timestep to invent."""
    assert schedule_of(scheduler) is None
    torch.testing.assert_close(times_of(scheduler), torch.arange(8, 0, -1).double() / 8)
    with pytest.raises(ValueError, match="unknown"):
        timestep_of(0.5, scheduler, denoiser_of(tiny.sd()))


def test_timesteps_outside_the_schedule_are_refused() -> None:
    """Settings that contradict each other would be read as some other noise level."""
    scheduler = prepared(DDIMScheduler, SD)
    scheduler.timesteps = scheduler.timesteps + 500
    with pytest.raises(ValueError, match="inside its noise schedule"):
        times_of(scheduler)
    scheduler = prepared(FlowMatchEulerDiscreteScheduler, {})
    scheduler.sigmas = 2 * scheduler.sigmas
    with pytest.raises(ValueError, match="inside its noise schedule"):
        times_of(scheduler)


CALLS = [
    (tiny.sd, DDIMScheduler, SD),
    (tiny.sd, EulerDiscreteScheduler, {**SD, "use_karras_sigmas": True}),
    (tiny.sd, PNDMScheduler, {**SD, "skip_prk_steps": True, "steps_offset": 1}),
    (tiny.sd, HeunDiscreteScheduler, SD),
    (tiny.sd, DPMSolverMultistepScheduler, FLOW),
    (tiny.sdxl, EulerAncestralDiscreteScheduler, SD),
    (tiny.sd3, FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    (tiny.sd3, FlowMatchHeunDiscreteScheduler, {"shift": 3.0}),
    (tiny.sd3, UniPCMultistepScheduler, FLOW),
    (tiny.flux, FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True}),
]


@pytest.mark.parametrize(("make", "kind", "settings"), CALLS, ids=lambda v: getattr(v, "__name__", ""))
def test_timesteps_are_what_the_pipeline_tells_its_denoiser(make: Any, kind: type, settings: dict[str, Any]) -> None:
    """A pipeline's own call, listened to: `timestep_of` of the times is each number that the denoiser hears."""
    pipe = make()
    pipe.scheduler = kind(**settings)
    heard, names = [], list(inspect.signature(type(denoiser_of(pipe)).forward).parameters)

    def listen(module: Any, args: tuple, kwargs: dict) -> None:
        timestep = dict(zip(names[1:], args, strict=False)).get("timestep", kwargs.get("timestep"))
        heard.append(float(timestep.flatten()[0]))

    denoiser_of(pipe).register_forward_pre_hook(listen, with_kwargs=True)
    pipe("a red circle", num_inference_steps=4, output_type="latent", height=16, width=16)
    told = timestep_of(times_of(pipe.scheduler), pipe.scheduler, denoiser_of(pipe))
    assert told.dtype == torch.float32
    torch.testing.assert_close(told, torch.tensor(heard), rtol=1e-6, atol=0)
    assert told_timesteps(pipe.scheduler, denoiser_of(pipe)) == pytest.approx(heard, rel=1e-6)
    times = times_of(pipe.scheduler)
    assert torch.equal(timestep_of(float(times[1]), pipe.scheduler, denoiser_of(pipe)), told[1])


def test_timesteps_between_the_entries() -> None:
    """Any other time inverts `times_of`: a UNet hears 1000 t - 1, SD3 1000 t, Flux t."""
    t = torch.tensor([0.9137, 0.0371], dtype=torch.float64)
    unet, flow = prepared(DDIMScheduler, SD), prepared(FlowMatchEulerDiscreteScheduler, {"shift": 3.0})
    for scheduler, pipe, expected in [(unet, tiny.sd, 1000 * t - 1), (flow, tiny.sd3, 1000 * t), (flow, tiny.flux, t)]:
        torch.testing.assert_close(timestep_of(t, scheduler, denoiser_of(pipe())), expected.float())


def test_a_denoiser_of_unknown_convention_is_refused_on_a_flow() -> None:
    """Between 1000 sigma, sigma and 1 - sigma a guess would be a silently wrong picture."""
    flow, stranger = prepared(FlowMatchEulerDiscreteScheduler, {}), torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="Linear is told"):
        timestep_of(0.5, flow, stranger)
    assert float(timestep_of(0.5, prepared(DDIMScheduler, SD), stranger)) == 499


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_parametrizations_give_the_schedulers_own_data(prediction_type: str) -> None:
    """DDIM's predicted x0 is ours, from the same output."""
    scheduler = prepared(DDIMScheduler, {**SD, "prediction_type": prediction_type, "clip_sample": False})
    schedule, x, output = schedule_of(scheduler), normal(0), normal(1)
    assert schedule is not None
    for timestep, t in zip(scheduler.timesteps, times_of(scheduler), strict=True):
        expected = scheduler.step(output, timestep, x).pred_original_sample
        got = convert(output, x, t, schedule, parametrization_of(scheduler), "x0")
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_flow_predictions_give_the_schedulers_own_data(kind: type) -> None:
    """Flow matching's last step lands on x0, and DPM++ converts its output to x0: both are ours."""
    settings = FLOW if kind is DPMSolverMultistepScheduler else {}
    scheduler = prepared(kind, settings)
    assert parametrization_of(scheduler) == "flow"
    x, output, t = normal(0), normal(1), times_of(scheduler)[-1]
    if kind is DPMSolverMultistepScheduler:
        scheduler._step_index = 7
        expected = scheduler.convert_model_output(output, sample=x)
    else:
        expected = scheduler.step(output, scheduler.timesteps[-1], x).prev_sample
    torch.testing.assert_close(convert(output, x, t, RectifiedFlow(), "flow", "x0"), expected, rtol=1e-5, atol=1e-5)


def test_unknown_predictions_are_refused() -> None:
    """A scheduler's kind that the core does not know is named, and not read as noise."""
    scheduler = prepared(DDIMScheduler, {**SD, "prediction_type": "epsilon"})
    scheduler.register_to_config(prediction_type="variance")
    with pytest.raises(ValueError, match="'variance'"):
        parametrization_of(scheduler)
