"""What a diffusers scheduler says of noise levels, in the core's terms: schedule, times, parametrisation and noise."""

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from jaxtyping import Float64
from torch import Tensor

from dbtheory.parametrization import Parametrization
from dbtheory.schedule import NoiseSchedule, RectifiedFlow, VPTabulated

FLOW_MATCHING = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)
PARAMETRIZATIONS: dict[str, Parametrization] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}
# on a flow, who is told sigma, and who is told num_train_timesteps times sigma: so their pipelines do
TOLD_SIGMA = (
    FluxTransformer2DModel,
    ChromaTransformer2DModel,
    QwenImageTransformer2DModel,
    AuraFlowTransformer2DModel,
)
TOLD_TIMESTEP = (SD3Transformer2DModel, SanaTransformer2DModel, UNet2DConditionModel)
# rectified flow's g^2 diverges at t = 1, where its pipelines start
LATEST_FLOW = 1 - 1e-6
NOISE = "randn_tensor"  # diffusers' source of noise, which its steps look up in their module


def schedule_of(scheduler: Any) -> NoiseSchedule | None:
    """The noise levels that a scheduler was made for; None where they are unknown (EDM, continuous sigmas).

    Raises:
        ValueError: an `alphas_cumprod` that is no noise schedule.
    """
    if _is_flow(scheduler):
        return RectifiedFlow()
    return VPTabulated(scheduler.alphas_cumprod) if _is_tabulated(scheduler) else None


def times_of(scheduler: Any) -> Float64[Tensor, " steps"]:
    """The time in (0, 1] of each entry of `scheduler.timesteps`, on the CPU; 0 = data.

    Variance preserving: `(timestep + 1)/num_train_timesteps`. Flow: sigma, at most `LATEST_FLOW`. Where the schedule is
    unknown, equal steps down from 1: they tell the order, and no noise level.

    Raises:
        ValueError: timesteps that lie outside the schedule.
    """
    if not (_is_flow(scheduler) or _is_tabulated(scheduler)):
        steps = len(scheduler.timesteps)
        return 1 - torch.arange(steps, dtype=torch.float64) / steps
    timesteps = scheduler.timesteps.detach().to("cpu", torch.float64)
    if _is_flow(scheduler):
        # a scheduler may round what it tells the denoiser, and its steps follow sigma
        times = scheduler.sigmas[: len(timesteps)].detach().to("cpu", torch.float64)
    else:
        times = (timesteps + 1) / scheduler.config.num_train_timesteps
    if not bool(((times > 0) & (times <= 1)).all()):
        raise ValueError(
            f"the timesteps of {type(scheduler).__name__} must lie inside its noise schedule, received {timesteps}; "
            "an inverse scheduler, or one whose settings contradict each other, cannot be followed"
        )
    return times.clamp_max(LATEST_FLOW) if _is_flow(scheduler) else times


def timestep_of(t: Tensor | float, scheduler: Any, denoiser: Any) -> Tensor:
    """The number that the pipeline tells its denoiser at time `t`, a scalar or (n,), float32 on the device of `t`.

    At the times of the schedule it is the scheduler's own entry, rounded where that is; between them the inverse of
    `times_of`. A flow tells Flux and its kin sigma instead.

    Raises:
        ValueError: an unknown schedule, or on a flow a denoiser whose convention is unknown.
    """
    if not (_is_flow(scheduler) or _is_tabulated(scheduler)):
        raise ValueError(f"the noise levels of {type(scheduler).__name__} are unknown, so no time has a timestep")
    time = torch.as_tensor(t, dtype=torch.float64).cpu()
    gap, entry = (times_of(scheduler) - time[..., None]).abs().min(-1)
    inverse = time * scheduler.config.num_train_timesteps - (0 if _is_flow(scheduler) else 1)
    timestep = torch.where(gap < 1e-9, scheduler.timesteps.to("cpu", torch.float64)[entry], inverse)
    if _is_flow(scheduler) and _is_told_sigma(denoiser):
        timestep = timestep / scheduler.config.num_train_timesteps
    return timestep.to(t.device if isinstance(t, Tensor) else "cpu", torch.float32)


def told_timesteps(scheduler: Any, denoiser: Any) -> list[float]:
    """What a pipeline tells its denoiser at each of the scheduler's timesteps: themselves, or their sigmas."""
    told = scheduler.timesteps.to(torch.float64).tolist()
    if _is_flow(scheduler) and isinstance(denoiser, TOLD_SIGMA):
        return [timestep / scheduler.config.num_train_timesteps for timestep in told]
    return told


def parametrization_of(scheduler: Any) -> Parametrization:
    """What the denoiser predicts; ValueError for a kind that is not one of the core's."""
    if isinstance(scheduler, FLOW_MATCHING):
        return "flow"
    kind = _setting(scheduler, "prediction_type", None)
    if kind not in PARAMETRIZATIONS:
        raise ValueError(
            f"{type(scheduler).__name__} has prediction_type {kind!r}; it must be one of {', '.join(PARAMETRIZATIONS)}"
        )
    return PARAMETRIZATIONS[kind]


def draws_noise(scheduler: Any, eta: float | None) -> bool:
    """Whether a step is a Gaussian reverse step with noise of its own: DDPM, Euler ancestral, DDIM where `eta > 0`.

    False for every other scheduler, those that draw for another purpose (restarts, churn) included.
    """
    if isinstance(scheduler, DDIMScheduler):
        return eta is not None and eta > 0
    return isinstance(scheduler, DDPMScheduler | EulerAncestralDiscreteScheduler)


def step_with_noise(step: Callable[..., Any], draw: Callable[..., Tensor]) -> Callable[..., Any]:
    """A scheduler's bound `step` that takes its noise from `draw(shape, generator=, device=, dtype=, layout=)`.

    `draw` stands for diffusers' `randn_tensor`, in a copy with globals of its own: neither the scheduler nor its module
    changes. Decorators are left behind.

    Raises:
        ValueError: a step that is bound to no scheduler, or that calls no `randn_tensor` itself.
    """
    inner = inspect.unwrap(step)
    function, owner = getattr(inner, "__func__", inner), getattr(step, "__self__", getattr(inner, "__self__", None))
    named = isinstance(function, FunctionType) and NOISE in function.__code__.co_names
    if owner is None or not named or NOISE not in function.__globals__:
        raise ValueError(f"{step} is no scheduler's step that draws its noise by {NOISE}; use DDIM, DDPM or Euler a")
    copy = FunctionType(
        function.__code__,
        function.__globals__ | {NOISE: draw},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return MethodType(copy, owner)


def _is_flow(scheduler: Any) -> bool:
    straight = isinstance(scheduler, FLOW_MATCHING) or bool(_setting(scheduler, "use_flow_sigmas", False))
    # Mochi's sigma counts from noise to data
    return straight and not _setting(scheduler, "invert_sigmas", False)


def _is_tabulated(scheduler: Any) -> bool:
    """Variance preserving, with one timestep an entry of `alphas_cumprod`."""
    discrete = _setting(scheduler, "timestep_type", "discrete") == "discrete"
    return discrete and isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor)


def _is_told_sigma(denoiser: Any) -> bool:
    if not isinstance(denoiser, TOLD_SIGMA + TOLD_TIMESTEP):
        raise ValueError(f"it is not known how {type(denoiser).__name__} is told its noise level; bind a timestep")
    return isinstance(denoiser, TOLD_SIGMA)


def _setting(scheduler: Any, name: str, default: Any) -> Any:
    return getattr(scheduler.config, name, default)
