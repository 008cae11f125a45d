"""The noise of diffusers' steps: who draws it, and a step that takes another, against the core's closed forms."""

import functools
import inspect
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.schedulers import scheduling_ddpm
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dbtheory.parametrization import convert
from dbtheory.steps import ddim_step, ddpm_step
from scale.levels import draws_noise, schedule_of, step_with_noise, times_of
from tests.scale.schedulers import SD, SHAPE, normal, prepared


class OwnDDPM(DDPMScheduler):
    """A subclass that keeps its parent's step."""


STOCHASTIC = [
    (DDPMScheduler, {"clip_sample": False}, {}, True),
    (OwnDDPM, {"clip_sample": False}, {}, True),
    (DDIMScheduler, {"clip_sample": False}, {"eta": 0.0}, False),
    (DDIMScheduler, {"clip_sample": False}, {"eta": 0.3}, True),
    (EulerAncestralDiscreteScheduler, {}, {}, True),
    (EulerDiscreteScheduler, {}, {}, False),
    (HeunDiscreteScheduler, {}, {}, False),
    (DPMSolverMultistepScheduler, {}, {}, False),
    (FlowMatchEulerDiscreteScheduler, {}, {}, False),
]


@pytest.mark.parametrize(("kind", "settings", "options", "expected"), STOCHASTIC)
def test_who_draws_noise(kind: type, settings: dict[str, Any], options: dict[str, Any], expected: bool) -> None:
    """Two generators give two results exactly where `draws_noise` says so."""
    accepted = inspect.signature(kind.step).parameters  # pyright: ignore[reportAttributeAccessIssue]
    results = []
    for seed in (0, 1):
        scheduler = prepared(kind, settings)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(normal(0), scheduler.timesteps[1])
        noise = {"generator": torch.Generator().manual_seed(seed)} if "generator" in accepted else {}
        results.append(scheduler.step(normal(1), scheduler.timesteps[1], normal(0), **options, **noise).prev_sample)
    assert torch.equal(*results) != expected
    assert draws_noise(prepared(kind, settings), options.get("eta")) == expected


def test_noise_for_other_purposes_is_not_a_gaussian_step() -> None:
    """The stochastic DPM++ draws, but its kernel is not that of a reverse step: not by this route."""
    assert not draws_noise(prepared(DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}), 1.0)
    assert not draws_noise(prepared(FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}), 1.0)


KERNELS = [
    (DDPMScheduler, None),
    (DDIMScheduler, 0.2),
    (DDIMScheduler, 1.0),
    (EulerAncestralDiscreteScheduler, None),
]


def closed_form(scheduler: Any, k: int, x: Tensor, eps: Tensor, z: Tensor, eta: float | None) -> Tensor:
    """Step `k` in variance-preserving coordinates, from the core's formulas: the reversal of the noising at `eps`."""
    schedule, times = schedule_of(scheduler), [*times_of(scheduler), torch.zeros((), dtype=torch.float64)]
    assert schedule is not None
    t, s = times[k], times[k + 1]
    x0 = convert(eps, x, t, schedule, "eps", "x0")
    return ddpm_step(x, x0, t, s, z, schedule) if eta is None else ddim_step(x, x0, t, s, z, schedule, eta)


@pytest.mark.parametrize("size", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("k", [0, 3, 6])
@pytest.mark.parametrize(("kind", "eta"), KERNELS)
def test_a_step_takes_the_noise_it_is_given(kind: type, eta: float | None, k: int, size: float) -> None:
    """The step is mean + size * sigma z, mean and sigma from the core's closed forms at the scheduler's levels.

    Euler ancestral steps x/alpha; in x it is the same reversal as DDPM's.
    """
    scheduler = prepared(kind, SD if kind is EulerAncestralDiscreteScheduler else {**SD, "clip_sample": False})
    schedule, times = schedule_of(scheduler), [*times_of(scheduler), torch.zeros((), dtype=torch.float64)]
    assert schedule is not None
    x, eps = normal(0), normal(1)
    z = randn_tensor(SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    def draw(shape: tuple[int, ...], **kwargs: Any) -> Tensor:
        return size * randn_tensor(shape, **kwargs)

    own = kind is EulerAncestralDiscreteScheduler
    before, after = (float(schedule.alpha(time)) if own else 1.0 for time in (times[k], times[k + 1]))
    scheduler.scale_model_input(x / before, scheduler.timesteps[k])
    options = {} if eta is None else {"eta": eta}
    step = step_with_noise(scheduler.step, draw)
    generator = torch.Generator().manual_seed(7)
    got = step(eps, scheduler.timesteps[k], x / before, generator=generator, **options).prev_sample * after
    torch.testing.assert_close(got, closed_form(scheduler, k, x, eps, size * z, eta), rtol=1e-4, atol=1e-5)
    if size != 1.0:
        wrong = closed_form(scheduler, k, x, eps, z, eta)
        assert float((got - wrong).abs().max()) > 1e-2


@pytest.mark.parametrize(("kind", "eta"), KERNELS)
def test_the_schedulers_own_steps_stay_its_own(kind: type, eta: float | None) -> None:
    """Bit for bit: with diffusers' own draw the copy is the step, and later steps of the scheduler are untouched.

    One generator an image goes through as it is.
    """
    options, module = {} if eta is None else {"eta": eta}, inspect.getmodule(kind)
    one, other = prepared(kind, SD), prepared(kind, SD)
    generators = [[torch.Generator().manual_seed(i) for i in range(3)] for _ in range(2)]
    x = y = normal(0).float()
    for k, timestep in enumerate(one.timesteps):
        for scheduler, value in ((one, x), (other, y)):
            scheduler.scale_model_input(value, timestep)
        step = one.step if k % 2 else step_with_noise(one.step, randn_tensor)
        x = step(normal(k).float(), timestep, x, generator=generators[0], **options).prev_sample
        y = other.step(normal(k).float(), timestep, y, generator=generators[1], **options).prev_sample
        assert torch.equal(x, y)
    assert getattr(module, "randn_tensor") is randn_tensor  # noqa: B009
    assert "step" not in vars(one)


def zeros(shape: tuple[int, ...], **kwargs: Any) -> Tensor:
    return torch.zeros(shape, dtype=kwargs["dtype"])


def test_a_wrapped_step_is_found() -> None:
    """What watches a scheduler wraps its step on the instance; the copy is of the step inside."""
    scheduler = prepared(DDPMScheduler, {**SD, "clip_sample": False})
    expected = step_with_noise(scheduler.step, zeros)(normal(1), scheduler.timesteps[2], normal(0)).prev_sample
    scheduler.step = functools.wraps(scheduler.step)(functools.partial(scheduler.step))
    step = step_with_noise(scheduler.step, zeros)
    assert torch.equal(step(normal(1), scheduler.timesteps[2], normal(0)).prev_sample, expected)
    assert list(inspect.signature(step).parameters) == list(inspect.signature(DDPMScheduler().step).parameters)


class Delegating(DDPMScheduler):
    """Its step draws nothing itself."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)


@pytest.mark.parametrize(
    "step",
    [
        PNDMScheduler().step,
        Delegating().step,
        DDPMScheduler.step,
        functools.partial(DDPMScheduler().step),
        scheduling_ddpm.randn_tensor,
        AutoencoderKL.forward,
        torch.relu,
    ],
)
def test_steps_without_noise_of_their_own_are_refused(step: Any) -> None:
    """Replacing a draw that never happens would be a silent no."""
    with pytest.raises(ValueError, match="draws its noise"):
        step_with_noise(step, zeros)
