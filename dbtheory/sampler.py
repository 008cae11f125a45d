"""Reverse-time generation, from noise (t = 1) down to data (t = 0)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.blend import Blender, Step
from dbtheory.correct import FeynmanKac, Particles, Trace
from dbtheory.experts import Experts, Points
from dbtheory.parametrization import convert
from dbtheory.precision import PrecisionBlend
from dbtheory.schedule import NoiseSchedule
from dbtheory.steps import ddim_step, ddpm_step, euler_maruyama_step, step_variance

METHODS = ("ddpm", "ddim", "euler")


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
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, received {method!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1] (0 is deterministic, 1 is ancestral), received {eta}")
    if isinstance(blender, PrecisionBlend) and callable(blender.variances) and method != "ddpm":
        raise ValueError(f'covariances of x_s given x_t belong to method="ddpm", received {method!r}')
    if n < 1:
        raise ValueError(f"n must be at least 1, received {n}")
    schedule, shape = experts.schedule, (n, *experts.event_shape)
    times = _checked_grid(time_grid(schedule, steps) if grid is None else grid, steps)
    draw = _drawer(generator, experts)
    x = draw(shape) * schedule.sigma(times[0]).to(experts.dtype) if x_T is None else _shaped("x_T", x_T, shape)
    phase = draw((n,), uniform=True) if phase is None else _shaped("phase", phase, (n,))
    noise = None if noise is None else _shaped("noise", noise, (steps, *shape))
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
        if isinstance(blender, PrecisionBlend):
            own = step_variance(method, schedule, step.t, step.t_next, eta)
            mean = _advance(method, x, prediction, step, torch.zeros_like(x), experts, eta)
            x = mean + blender.noise(z, own, x, step)
        else:
            x = _advance(method, x, prediction, step, z, experts, eta)
        if progress is not None:
            progress(k + 1, steps)
    return x


def _advance(
    method: str, x: Tensor, prediction: Tensor, step: Step, noise: Tensor, experts: Experts, eta: float
) -> Tensor:
    schedule, source, t, t_next = experts.schedule, experts.parametrization, step.t, step.t_next
    if method == "euler":
        score = convert(prediction, x, t, schedule, source=source, target="score")
        return euler_maruyama_step(x, score, t, t_next, noise, schedule)
    x0 = convert(prediction, x, t, schedule, source=source, target="x0")
    if method == "ddim":
        return ddim_step(x, x0, t, t_next, noise, schedule, eta)
    return ddpm_step(x, x0, t, t_next, noise, schedule)


def _drawer(generator: torch.Generator | None, experts: Experts) -> Callable[..., Tensor]:
    def draw(shape: tuple[int, ...], uniform: bool = False) -> Tensor:
        if generator is None:
            raise ValueError("sampling draws random numbers: pass a generator, or x_T, phase and noise")
        source = torch.rand if uniform else torch.randn
        dtype = torch.float64 if uniform else experts.dtype
        return source(shape, generator=generator, dtype=dtype, device=generator.device).to(experts.device)

    return draw


def _shaped(what: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(value.shape) != shape:
        raise ValueError(f"{what} must have shape {shape}, received {tuple(value.shape)}")
    return value


def _checked_grid(grid: Tensor, steps: int) -> Tensor:
    _shaped("grid", grid, (steps + 1,))
    if not bool((grid.diff() < 0).all()) or float(grid[0]) > 1 or float(grid[-1]) < 0:
        raise ValueError(f"grid must decrease from at most 1 to at least 0, received {grid.tolist()}")
    return grid
