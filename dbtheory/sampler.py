"""Reverse-time generation, from noise (t = 1) down to data (t = 0)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.blend import Blender, NoisyBlender, Step
from dbtheory.correct import FeynmanKac, Particles, Trace
from dbtheory.experts import Experts, Points
from dbtheory.schedule import NoiseSchedule
from dbtheory.steps import METHODS, advance, step_variance


def time_grid(schedule: NoiseSchedule, steps: int, power: float = 1.0) -> Float[Tensor, " times"]:
    """Times from `t_start` down to `t_end`, evenly spaced in `t^(1/power)`: power > 1 crowds them at data."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, received {steps}")
    root = torch.linspace(
        schedule.t_start ** (1 / power), schedule.t_end ** (1 / power), steps + 1, dtype=torch.float64
    )
    times = root**power
    times[0], times[-1] = schedule.t_start, schedule.t_end
    return times


def sample(
    experts: Experts,
    blender: Blender,
    n: int,
    steps: int,
    generator: torch.Generator | None = None,
    *,
    method: str = "ddpm",
    eta: float = 1.0,
    x_T: Points | None = None,
    noise: Tensor | None = None,
    phase: Float[Tensor, " n"] | None = None,
    grid: Float[Tensor, " times"] | None = None,
    progress: Callable[[int, int], None] | None = None,
    correct: FeynmanKac | None = None,
    trace: Trace | None = None,
) -> Points:
    """`n` samples of the blend, `(n, *event_shape)`, in `steps` steps from noise to data.

    What is not given is drawn from `generator`, in this order: `x_T` ~ N(0, sigma(t_start)^2 I); `phase`, one
    uniform a sample; `noise`, standard normal, one slice a step. `grid` are decreasing times (default
    `time_grid`); `eta` is used by `method="ddim"` only. `progress(done, steps)` is called after each step.

    `correct` weighs and resamples the samples, so that they follow the preference's target and not the blend's own
    law (`dbtheory.correct`): they stay equally weighted, but are no longer independent. `trace` is filled with
    what the weights were; without `correct` they are recorded, and the samples are those of the plain blend.

    Raises:
        ValueError: an unknown method, n or steps below 1, arguments of another shape, a grid that does not
            decrease within [0, 1], or a missing generator where something has to be drawn; with `correct` or
            `trace`, what `dbtheory.correct.Particles` refuses.
    """
    _require_settings(blender, n, steps, method, eta)
    schedule, shape = experts.schedule, (n, *experts.event_shape)
    times = _checked_grid(time_grid(schedule, steps) if grid is None else grid, steps, schedule)
    draw = _drawer(generator, experts)
    x = draw(shape) * schedule.sigma(times[0]).to(experts.dtype) if x_T is None else _given("x_T", x_T, shape, experts)
    phase = draw((n,), uniform=True) if phase is None else _checked_phase(phase, n)
    noise = None if noise is None else _given("noise", noise, (steps, *shape), experts)
    weighted = correct is not None or trace is not None
    particles = Particles(experts, blender, n, method, eta, correct, trace) if weighted else None
    for k in range(steps):
        step = Step(k, steps, times[k], times[k + 1], phase)
        if particles is None:
            prediction = blender(experts, x, step.t, step)
        else:
            prediction = particles.blend(x, step)
            kept = particles.survivors(step, lambda: draw((1,), uniform=True))
            x, phase, prediction = (part if kept is None else part[kept] for part in (x, phase, prediction))
        z = draw(shape) if noise is None else noise[k]
        x = _next(experts, blender, x, prediction, step, z, method, eta)
        if progress is not None:
            progress(k + 1, steps)
    return x


def _next(
    experts: Experts,
    blender: Blender,
    x: Points,
    prediction: Points,
    step: Step,
    z: Points,
    method: str,
    eta: float,
) -> Points:
    """The sampler's step by standard normal `z`, whose noise a `NoisyBlender` shapes."""
    schedule, t, t_next = experts.schedule, step.t, step.t_next

    def move(noise: Points) -> Points:
        return advance(method, x, prediction, t, t_next, noise, schedule, source=experts.parametrization, eta=eta)

    if not isinstance(blender, NoisyBlender):
        return move(z)
    own = step_variance(method, schedule, t, t_next, eta)
    return move(torch.zeros_like(x)) + blender.noise(z, own, x, step)


def _require_settings(blender: Blender, n: int, steps: int, method: str, eta: float) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, received {method!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1] (0 is deterministic, 1 is ancestral), received {eta}")
    for name, count in (("n", n), ("steps", steps)):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be at least 1, and an integer, received {count!r}")
    if isinstance(blender, NoisyBlender):
        blender.require_method(method)


def _drawer(generator: torch.Generator | None, experts: Experts) -> Callable[..., Tensor]:
    def draw(shape: tuple[int, ...], uniform: bool = False) -> Tensor:
        if generator is None:
            raise ValueError("sampling draws random numbers: pass a generator, or x_T, phase and noise")
        source = torch.rand if uniform else torch.randn
        dtype = torch.float64 if uniform else experts.dtype
        return source(shape, generator=generator, dtype=dtype, device=generator.device).to(experts.device)

    return draw


def _shaped(what: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        raise ValueError(f"{what} must have shape {shape} and be a tensor, received {getattr(value, 'shape', value)}")
    return value


def _given(what: str, value: Tensor, shape: tuple[int, ...], experts: Experts) -> Tensor:
    """Numbers that the caller drew, as the experts take them."""
    if not bool(_shaped(what, value, shape).isfinite().all()):
        raise ValueError(f"{what} must be finite, received NaN or infinity")
    return value.to(experts.device, experts.dtype)


def _checked_phase(phase: Tensor, n: int) -> Tensor:
    if not bool(((_shaped("phase", phase, (n,)) >= 0) & (phase < 1)).all()) or not phase.is_floating_point():
        raise ValueError(f"phase must hold floating numbers in [0, 1), received {phase.tolist()}")
    return phase


def _checked_grid(grid: Tensor, steps: int, schedule: NoiseSchedule) -> Tensor:
    _shaped("grid", grid, (steps + 1,))
    if not bool((grid.diff() < 0).all()) or float(grid[0]) > schedule.t_start or float(grid[-1]) < 0:
        raise ValueError(
            f"grid must decrease from at most {schedule.t_start} (the schedule's t_start) to at least 0, "
            f"received {grid.tolist()}"
        )
    return grid
