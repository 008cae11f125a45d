"""Reverse-time generation, from noise (t = 1) down to data (t = 0).

A step is a pure function, and its noise is an argument: coupled paths and exact equality can be tested.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.blend import Blender, Step
from dbtheory.experts import Experts, Points
from dbtheory.parametrization import convert
from dbtheory.precision import PrecisionBlend
from dbtheory.schedule import NoiseSchedule

METHODS = ("ddpm", "ddim", "euler")
Time = Tensor | float


def euler_maruyama_step(
    x: Points,
    score: Points,
    t: Time,
    t_next: Time,
    noise: Points,
    schedule: NoiseSchedule,
) -> Points:
    """`x - (f x - g^2 score) h + g sqrt(h) z` with `h = t - t_next > 0` (MATH.md 1; paper eq. 9)."""
    h = t - t_next
    f, g2 = schedule.drift_rate(t), schedule.diffusion_squared(t)
    drift = f * x - g2 * score
    return x - drift * h + (g2 * h) ** 0.5 * noise


def ddpm_step(
    x: Points,
    x0: Points,
    t: Time,
    t_next: Time,
    noise: Points,
    schedule: NoiseSchedule,
) -> Points:
    """A draw from `q(x_s | x_t, x_0)`, s = t_next, at the predicted `x0` (Ho et al. 2020, eq. 6-7)."""
    alpha_s, sigma_s = schedule.alpha(t_next), schedule.sigma(t_next)
    alpha_ts = schedule.alpha(t) / alpha_s
    shrink = alpha_ts * (sigma_s / schedule.sigma(t)) ** 2
    mean = shrink * x + (alpha_s - shrink * schedule.alpha(t)) * x0
    return mean + posterior_variance(schedule, t, t_next) ** 0.5 * noise


def ddim_step(
    x: Points,
    x0: Points,
    t: Time,
    t_next: Time,
    noise: Points,
    schedule: NoiseSchedule,
    eta: float = 0.0,
) -> Points:
    """DDIM (Song et al. 2021, eq. 12): `eta=0` is deterministic, `eta=1` is `ddpm_step`."""
    eps = convert(x0, x, t, schedule, source="x0", target="eps")
    variance = eta**2 * posterior_variance(schedule, t, t_next)
    direction = (schedule.sigma(t_next) ** 2 - variance) ** 0.5
    return schedule.alpha(t_next) * x0 + direction * eps + variance**0.5 * noise


def posterior_variance(schedule: NoiseSchedule, t: Time, t_next: Time) -> Tensor:
    """Variance of `q(x_s | x_t, x_0)`, s = t_next < t: `s_s^2 (1 - (a_t s_s / (a_s s_t))^2)`."""
    sigma_s = schedule.sigma(t_next)
    ratio = schedule.alpha(t) / schedule.alpha(t_next) * sigma_s / schedule.sigma(t)
    return sigma_s**2 * (1 - ratio**2)


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
) -> Points:
    """`n` samples of the blend, `(n, *event_shape)`, in `steps` steps from noise to data.

    What is not given is drawn from `generator`, in this order: `x_T` ~ N(0, sigma(t_start)^2 I); `phase`, one
    uniform a sample; `noise`, standard normal, one slice a step. `grid` are decreasing times (default
    `time_grid`); `eta` is used by `method="ddim"` only. `progress(done, steps)` is called after each step.

    Raises:
        ValueError: an unknown method, n or steps below 1, arguments of another shape, a grid that does not
            decrease within [0, 1], or a missing generator where something has to be drawn.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, received {method!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1] (0 is deterministic, 1 is ancestral), received {eta}")
    if n < 1:
        raise ValueError(f"n must be at least 1, received {n}")
    schedule, shape = experts.schedule, (n, *experts.event_shape)
    times = _checked_grid(time_grid(schedule, steps) if grid is None else grid, steps)
    draw = _drawer(generator, experts)
    x = draw(shape) * schedule.sigma(times[0]).to(experts.dtype) if x_T is None else _shaped("x_T", x_T, shape)
    phase = draw((n,), uniform=True) if phase is None else _shaped("phase", phase, (n,))
    noise = None if noise is None else _shaped("noise", noise, (steps, *shape))
    scale = blender.noise_variance**0.5 if isinstance(blender, PrecisionBlend) else 1.0
    for k in range(steps):
        t, t_next = times[k], times[k + 1]
        prediction = blender(experts, x, t, Step(k, steps, t, t_next, phase))
        z = draw(shape) if noise is None else noise[k]
        x = _advance(method, x, prediction, t, t_next, scale * z, experts, eta)
        if progress is not None:
            progress(k + 1, steps)
    return x


def _advance(
    method: str,
    x: Tensor,
    prediction: Tensor,
    t: Tensor,
    t_next: Tensor,
    noise: Tensor,
    experts: Experts,
    eta: float,
) -> Tensor:
    schedule, source = experts.schedule, experts.parametrization
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
