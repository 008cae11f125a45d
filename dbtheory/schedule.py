"""Noise schedules: how much data and how much noise is left at a time (MATH.md 1).

Time runs forward from data, `t = 0`, to noise, `t = 1`, and `x_t = alpha(t) x_0 + sigma(t) z` with `z ~ N(0, I)`.
The same marginals solve `dx = f(t) x dt + g(t) dw` with `f = (log alpha)'` and `g^2 = (sigma^2)' - 2 f sigma^2`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from scipy.interpolate import CubicSpline, PchipInterpolator
from torch import Tensor

Time = Tensor | float | int
ZERO_SIGNAL = 2.0**-24  # what diffusers' Euler schedulers write for a terminal alpha^2 of 0


def as_time(t: Time) -> Tensor:
    """`t` as a floating tensor (float64 unless it has another float dtype); ValueError outside [0, 1]."""
    time = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    if not time.is_floating_point():
        time = time.to(torch.float64)
    if not bool(((time >= 0) & (time <= 1)).all()):
        raise ValueError(f"time must lie in [0, 1] (0 = data, 1 = noise), got {t}; rescale it first")
    return time


def expand_like(value: Tensor, x: Tensor) -> Tensor:
    """One scalar, or one value for each row of `x` (n, ...), in the shape and dtype that multiply `x`."""
    if value.ndim == 0:
        return value.to(x)
    if x.ndim == 0 or value.shape != x.shape[:1]:
        raise ValueError(
            f"time must be a scalar or hold one value per row of x: got shape {tuple(value.shape)} "
            f"for x of shape {tuple(x.shape)}"
        )
    return value.to(x).reshape(-1, *[1] * (x.ndim - 1))


class NoiseSchedule(ABC):
    """The map from a time to `(alpha, sigma)`, with the SDE that has those marginals.

    Every method takes a float or a tensor of times in [0, 1] and returns a tensor of the same shape, float64
    unless the times have another float dtype. ValueError for a time that is NaN or outside [0, 1].
    `t_start` is where generation starts from `N(0, sigma^2 I)`; below 1 where f and g^2 diverge at 1.
    `t_end` is where generation ends; a sampler evaluates no denoiser there.
    """

    t_start: float = 1.0
    t_end: float = 0.0

    @abstractmethod
    def log_alpha(self, t: Time) -> Tensor:
        """Logarithm of the signal's scale."""

    @abstractmethod
    def variance(self, t: Time) -> Tensor:
        """`sigma(t)^2`, without cancellation near `t = 0`."""

    @abstractmethod
    def drift_rate(self, t: Time) -> Tensor:
        """`f(t) = d/dt log alpha(t)`."""

    @abstractmethod
    def diffusion_squared(self, t: Time) -> Tensor:
        """`g(t)^2 = d/dt sigma^2 - 2 f sigma^2`."""

    def alpha(self, t: Time) -> Tensor:
        """The signal's scale."""
        return self.log_alpha(t).exp()

    def sigma(self, t: Time) -> Tensor:
        """The noise's standard deviation."""
        return self.variance(t).sqrt()


class VariancePreserving(NoiseSchedule):
    """`alpha^2 + sigma^2 = 1`; hence `f = -beta/2` and `g^2 = beta`."""

    def variance(self, t: Time) -> Tensor:
        return -torch.expm1(2 * self.log_alpha(t))

    def diffusion_squared(self, t: Time) -> Tensor:
        return -2 * self.drift_rate(t)


@dataclass(frozen=True)
class VPLinear(VariancePreserving):
    """`beta(t) = beta_min + t (beta_max - beta_min)` (Song et al. 2021, appendix C)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        _require_increasing("beta_min", self.beta_min, "beta_max", self.beta_max)

    def log_alpha(self, t: Time) -> Tensor:
        t = as_time(t)
        return -0.5 * t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def drift_rate(self, t: Time) -> Tensor:
        return -0.5 * (self.beta_min + as_time(t) * (self.beta_max - self.beta_min))


@dataclass(frozen=True)
class VPCosine(VariancePreserving):
    """`alpha(t) = cos(u(t)) / cos(u(0))`, `u(t) = (pi/2) (t + offset)/(1 + offset)`.

    Nichol and Dhariwal (2021). f and g^2 diverge at `t = 1`, so generation starts a little below.
    """

    offset: float = 0.008
    t_start: float = field(default=0.995, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.offset < math.inf:
            raise ValueError(f"offset must be finite and >= 0, got {self.offset}")

    @property
    def _rate(self) -> float:
        return 0.5 * math.pi / (1 + self.offset)

    def log_alpha(self, t: Time) -> Tensor:
        return 0.5 * torch.log1p(-self.variance(t))

    def alpha(self, t: Time) -> Tensor:
        # At t = 1 the cosine is zero up to rounding: clamp so that the sign cannot flip.
        return torch.cos(self._angle(t)).clamp_min(0) / math.cos(self._rate * self.offset)

    def variance(self, t: Time) -> Tensor:
        # cos^2 u0 - cos^2 u = sin(u - u0) sin(u + u0): no cancellation as u -> u0.
        angle, start = self._angle(t), self._rate * self.offset
        return torch.sin(self._rate * as_time(t)) * torch.sin(angle + start) / math.cos(start) ** 2

    def drift_rate(self, t: Time) -> Tensor:
        return -self._rate * torch.tan(self._angle(t))

    def _angle(self, t: Time) -> Tensor:
        return self._rate * (as_time(t) + self.offset)


class VPPiecewise(VariancePreserving):
    """`log alpha` as a cubic polynomial between the points `t = k/count`: a discrete schedule made continuous."""

    count: int
    _pieces: Tensor  # (4, count), float64, cubic term first

    def log_alpha(self, t: Time) -> Tensor:
        t = as_time(t)
        offset, (c3, c2, c1, c0) = self._segment(t)
        return (((c3 * offset + c2) * offset + c1) * offset + c0).to(t.dtype)

    def drift_rate(self, t: Time) -> Tensor:
        t = as_time(t)
        offset, (c3, c2, c1, _) = self._segment(t)
        return ((3 * c3 * offset + 2 * c2) * offset + c1).to(t.dtype)

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Distance from the left knot and the segment's coefficients (4, ...), in float64."""
        t = t.double()
        knot = (t.detach() * self.count).floor().clamp(0, self.count - 1)
        return t - knot / self.count, self._pieces.to(t.device)[:, knot.long()]


@dataclass(frozen=True)
class VPDiscrete(VPPiecewise):
    """The "scaled linear" schedule of Stable Diffusion, made continuous.

    At `t = k/count`, `k = 1..count`, `alpha^2` is the product of `1 - beta_j` over `j = 1..k`, with
    `sqrt(beta)` linear from beta_start to beta_end: index `i` of diffusers is `t = (i + 1)/count`. A cubic
    spline of `log alpha^2` joins these points and the data (`t = 0`).
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    count: int = 1000
    _pieces: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _require_increasing("beta_start", self.beta_start, "beta_end", self.beta_end)
        if self.beta_end >= 1 or self.count < 2:
            raise ValueError(f"beta_end must be < 1 and count >= 2, got {self.beta_end} and {self.count}")
        beta = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.count) ** 2
        log_alpha_squared = np.concatenate([[0.0], np.cumsum(np.log1p(-beta))])
        spline = CubicSpline(np.arange(self.count + 1) / self.count, log_alpha_squared)
        object.__setattr__(self, "_pieces", torch.from_numpy(0.5 * spline.c))


class VPTabulated(VPPiecewise):
    """Any discrete schedule, made continuous, from the table that diffusers calls `alphas_cumprod`.

    `alpha^2` at `t = (i + 1)/count` is entry `i`, from near the data (i = 0) to noise. A monotone cubic (Fritsch and
    Carlson 1980) of `log alpha^2` joins these points and the data: `g^2` is nowhere negative, where an ordinary spline
    overshoots if betas jump. Zero terminal signal: where the last entry is 0, or the 2^-24 that diffusers' Euler
    schedulers write there, it is read as 2^-24, or as the entry before where that is lower; f and g^2 stay finite.

    Raises:
        ValueError: fewer than two entries, or entries that are not between 0 and 1, or that rise.
    """

    def __init__(self, alphas_cumprod: Float[Tensor, " count"]) -> None:
        alpha_squared = alphas_cumprod.detach().to("cpu", torch.float64).clone()
        if len(alpha_squared) > 1 and alpha_squared[-1] in (0, ZERO_SIGNAL):
            alpha_squared[-1] = alpha_squared[-2].clamp_max(ZERO_SIGNAL)
        falls = len(alpha_squared) > 1 and bool((alpha_squared.diff() <= 0).all())
        if not (falls and alpha_squared[-1] > 0 and alpha_squared[0] < 1):
            raise ValueError(
                "alphas_cumprod, the running product of 1 - beta, must hold two or more numbers that fall from below 1 "
                f"to no less than 0, got {len(alphas_cumprod)}: {alphas_cumprod[:2].tolist()} to "
                f"{alphas_cumprod[-2:].tolist()}"
            )
        self.count = len(alpha_squared)
        log_alpha = np.concatenate([[0.0], 0.5 * alpha_squared.log().numpy()])
        self._pieces = torch.from_numpy(PchipInterpolator(np.arange(self.count + 1) / self.count, log_alpha).c)

    def __repr__(self) -> str:
        return f"VPTabulated(count={self.count}, last={float(self.alpha(1.0)) ** 2:.3g})"


@dataclass(frozen=True)
class VE(NoiseSchedule):
    """`alpha = 1`, `sigma(t)^2 = sigma_min^2 ((sigma_max/sigma_min)^(2t) - 1)` (Song et al. 2021, eq. 29).

    This is the solution of the VE SDE that starts at the data, so `sigma(0) = 0`.
    """

    sigma_min: float = 0.01
    sigma_max: float = 10.0

    def __post_init__(self) -> None:
        _require_increasing("sigma_min", self.sigma_min, "sigma_max", self.sigma_max, strict=True)

    @property
    def _rate(self) -> float:
        return 2 * math.log(self.sigma_max / self.sigma_min)

    def log_alpha(self, t: Time) -> Tensor:
        return 0 * as_time(t)

    def variance(self, t: Time) -> Tensor:
        return self.sigma_min**2 * torch.expm1(self._rate * as_time(t))

    def drift_rate(self, t: Time) -> Tensor:
        return 0 * as_time(t)

    def diffusion_squared(self, t: Time) -> Tensor:
        return self.sigma_min**2 * self._rate * torch.exp(self._rate * as_time(t))


@dataclass(frozen=True)
class RectifiedFlow(NoiseSchedule):
    """`alpha = 1 - t`, `sigma = t` (Liu et al. 2023). f and g^2 diverge at 1, so generation starts below."""

    t_start: float = field(default=0.995, init=False)

    def log_alpha(self, t: Time) -> Tensor:
        return torch.log1p(-as_time(t))

    def alpha(self, t: Time) -> Tensor:
        return 1 - as_time(t)

    def variance(self, t: Time) -> Tensor:
        return as_time(t) ** 2

    def sigma(self, t: Time) -> Tensor:
        return 1 * as_time(t)

    def drift_rate(self, t: Time) -> Tensor:
        return -1 / (1 - as_time(t))

    def diffusion_squared(self, t: Time) -> Tensor:
        t = as_time(t)
        return 2 * t / (1 - t)


def _require_increasing(low_name: str, low: float, high_name: str, high: float, strict: bool = False) -> None:
    if not (0 < low <= high < math.inf) or (strict and low == high):
        order = "<" if strict else "<="
        raise ValueError(f"need 0 < {low_name} {order} {high_name} < inf, got {low} and {high}")
