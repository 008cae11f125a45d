"""What a denoiser's output means, and how to read it as another thing (MATH.md 1).

At one `(x_t, t)` these are affine maps of one another, with coefficients that depend on the schedule alone:
`x_t = alpha x0 + sigma eps`, `score = -eps/sigma`, `v = alpha eps - sigma x0`. On a straight path, alpha + sigma = 1,
`flow = dx_t/dt = eps - x0` (Liu et al. 2023; what SD3 and Flux predict).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from dbtheory.schedule import NoiseSchedule, Time, as_time, expand_like

Parametrization = Literal["eps", "x0", "v", "flow", "score"]


def convert(
    prediction: Tensor,
    x: Tensor,
    t: Time,
    schedule: NoiseSchedule,
    source: str,
    target: str,
) -> Tensor:
    """A prediction of kind `source` at `x_t = x` (n, ...) and `t`, a scalar or (n,), as one of kind `target`.

    `prediction` has the shape of `x`, or that shape with leading axes. Equal kinds return it untouched.
    Raises ValueError for an unknown kind, for shapes that disagree, for "flow" at a time where alpha + sigma is not 1,
    and at a time where the conversion would divide by zero (no noise: score, or noise from x0; no signal: x0 from
    noise).
    """
    _require_kinds(source, target)
    if prediction.shape[prediction.ndim - x.ndim :] != x.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} must end in the shape of x, {tuple(x.shape)}")
    if source == target:
        return prediction
    time = as_time(t)
    scales = schedule.alpha(time), schedule.sigma(time)
    if "flow" in (source, target):
        _require_straight(*scales, schedule)
    alpha, sigma = (expand_like(scale, x) for scale in scales)
    if target == "x0":
        return _to_x0(prediction, x, alpha, sigma, source)
    eps = _to_eps(prediction, x, alpha, sigma, source)
    if target == "eps":
        return eps
    if target == "score":
        return -eps / _nonzero(sigma, "noise")
    x0 = prediction if source == "x0" else _to_x0(prediction, x, alpha, sigma, source)
    return eps - x0 if target == "flow" else alpha * eps - sigma * x0


def _to_eps(prediction: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, source: str) -> Tensor:
    if source == "eps":
        return prediction
    if source == "score":
        return -sigma * prediction
    if source == "flow":
        return x + alpha * prediction
    if source == "v":
        return (alpha * prediction + sigma * x) / (alpha**2 + sigma**2)
    return (x - alpha * prediction) / _nonzero(sigma, "noise")


def _to_x0(prediction: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, source: str) -> Tensor:
    if source == "flow":
        return x - sigma * prediction
    if source == "v":
        return (alpha * x - sigma * prediction) / (alpha**2 + sigma**2)
    if source == "score":
        return (x + sigma**2 * prediction) / _nonzero(alpha, "signal")
    return (x - sigma * prediction) / _nonzero(alpha, "signal")


def _nonzero(scale: Tensor, what: str) -> Tensor:
    if bool((scale == 0).any()):
        raise ValueError(f"this conversion divides by the scale of the {what}, which is zero at this time")
    return scale


def _require_straight(alpha: Tensor, sigma: Tensor, schedule: NoiseSchedule) -> None:
    bent = (alpha + sigma - 1).abs() > 8 * torch.finfo(alpha.dtype).eps
    if bool(bent.any()):
        raise ValueError(
            f'"flow" is the velocity of a straight path, alpha + sigma = 1, which {schedule} is not; '
            "use RectifiedFlow, or another parametrisation"
        )


def _require_kinds(*kinds: str) -> None:
    for kind in kinds:
        if kind not in get_args(Parametrization):
            raise ValueError(f"unknown parametrisation {kind!r}; use one of {', '.join(get_args(Parametrization))}")
