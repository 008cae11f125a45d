"""One step of generation, from `x` at time `t` down to `t_next < t`, as a pure function.

The noise is an argument: coupled paths and exact equality can be tested.
"""

from torch import Tensor

from dbtheory.experts import Points
from dbtheory.parametrization import convert
from dbtheory.schedule import NoiseSchedule, Time

METHODS = ("ddpm", "ddim", "euler")


def advance(
    method: str,
    x: Points,
    prediction: Points,
    t: Time,
    t_next: Time,
    noise: Points,
    schedule: NoiseSchedule,
    *,
    source: str,
    eta: float = 1.0,
) -> Points:
    """One step by name, one of `METHODS`, from a prediction in the parametrisation `source`; `eta` is DDIM's."""
    if method == "euler":
        score = convert(prediction, x, t, schedule, source=source, target="score")
        return euler_maruyama_step(x, score, t, t_next, noise, schedule)
    x0 = convert(prediction, x, t, schedule, source=source, target="x0")
    if method == "ddim":
        return ddim_step(x, x0, t, t_next, noise, schedule, eta)
    return ddpm_step(x, x0, t, t_next, noise, schedule)


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
    gain = posterior_gain(schedule, t, t_next)
    shrink = (schedule.alpha(t_next) - gain) / schedule.alpha(t)
    mean = shrink * x + gain * x0
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
    return schedule.sigma(t_next) ** 2 * _unexplained(schedule, t, t_next)


def posterior_gain(schedule: NoiseSchedule, t: Time, t_next: Time) -> Tensor:
    """What x_0 adds to the mean of `q(x_s | x_t, x_0)`, s = t_next: `a_s - a_t (a_t/a_s) (s_s/s_t)^2`."""
    return schedule.alpha(t_next) * _unexplained(schedule, t, t_next)


def _unexplained(schedule: NoiseSchedule, t: Time, t_next: Time) -> Tensor:
    """The share of x_s's variance given x_0 that x_t does not explain: 1 less their squared correlation."""
    correlation = schedule.alpha(t) / schedule.alpha(t_next) * schedule.sigma(t_next) / schedule.sigma(t)
    return 1 - correlation**2


def step_variance(method: str, schedule: NoiseSchedule, t: Time, t_next: Time, eta: float) -> Tensor:
    """Variance of the noise that the sampler's own step adds."""
    if method == "euler":
        return schedule.diffusion_squared(t) * (t - t_next)
    return (eta**2 if method == "ddim" else 1.0) * posterior_variance(schedule, t, t_next)
