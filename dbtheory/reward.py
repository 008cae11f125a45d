"""Rewards: functions of a clean sample that can be added and scaled (MATH.md 2).

What a reward is decides how its expectations are computed (`dbtheory.control`, `dbtheory.tilt`): in closed form for
a `QuadraticReward`, by Gauss-Hermite for a `SmoothReward`, on a grid for any other `FunctionReward`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor


class Reward(ABC):
    """A function from points (..., d) to values (...). `r1 + r2` and `0.3 * r` are rewards too."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Values (...) at the points `x` (..., d)."""

    def __add__(self, other: Reward) -> Reward:
        if not isinstance(other, Reward):
            return NotImplemented
        return FunctionReward(lambda x: self.to(x)(x) + other.to(x)(x))

    def __radd__(self, other: int) -> Reward:
        # sum(rewards) starts from 0.
        return self if other == 0 else NotImplemented

    def __mul__(self, scale: float | int) -> Reward:
        return FunctionReward(lambda x: scale * self.to(x)(x))

    def __rmul__(self, scale: float | int) -> Reward:
        return self * scale

    def to(self, like: Tensor) -> Reward:
        """The reward with its parameters on the dtype and device of `like`."""
        return self


class FunctionReward(Reward):
    """Any callable from points (..., d) to values (...), differentiable where autograd is asked of it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        values = self.function(x)
        if values.shape != x.shape[:-1]:
            raise ValueError(
                f"a reward must map points (..., d) to values (...), got {tuple(values.shape)} from "
                f"{tuple(x.shape)}; sum over the last axis, or squeeze it"
            )
        return values


class SmoothReward(FunctionReward):
    """A function that polynomials approximate well on the scale of a posterior: analytic, bounded or slowly growing.

    `function` takes points (..., d), such as a small network with smooth activations. Where `directions` (k, d)
    are given it takes the coordinates `x @ directions.T` (..., k) instead: the reward depends on nothing else, and
    quadrature needs k dimensions in place of d. Sums and multiples of smooth rewards stay smooth, and know their
    directions. ValueError for directions that are no matrix; at a call, for points of another dimension.
    """

    directions: Tensor | None = None

    def __init__(self, function: Callable[[Tensor], Tensor], directions: Tensor | None = None) -> None:
        if directions is None:
            super().__init__(function)
            return
        if directions.ndim != 2 or not bool(directions.isfinite().all()):
            raise ValueError(f"directions must be finite and (k, d), got shape {tuple(directions.shape)}")
        super().__init__(lambda x: function(x @ directions.mT.to(x)))
        self.directions = directions

    def __call__(self, x: Tensor) -> Tensor:
        if self.directions is not None:
            _require_points(x, self.directions.shape[1])
        return super().__call__(x)

    def __add__(self, other: Reward) -> Reward:
        if not isinstance(other, SmoothReward):
            return super().__add__(other)
        total = SmoothReward(lambda x: self.to(x)(x) + other.to(x)(x))
        if self.directions is not None and other.directions is not None:
            if self.directions.shape[1] != other.directions.shape[1]:
                raise ValueError(
                    "rewards of different dimensions cannot be added: "
                    f"{self.directions.shape[1]} and {other.directions.shape[1]}"
                )
            total.directions = torch.cat([self.directions, other.directions.to(self.directions)])
        return total

    def __mul__(self, scale: float | int) -> SmoothReward:
        multiple = SmoothReward(lambda x: scale * self.to(x)(x))
        multiple.directions = self.directions
        return multiple

    def __rmul__(self, scale: float | int) -> SmoothReward:
        return self * scale


class RBFReward(SmoothReward):
    """`r(x) = sum_j amplitudes[j] exp(-|x - centres[j]|^2 / (2 widths[j]^2))`, bounded by the amplitudes' sum.

    `centres` (k, d), `widths` and `amplitudes` (k,). ValueError where shapes disagree or a width is not positive.
    """

    def __init__(self, centres: Tensor, widths: Tensor, amplitudes: Tensor) -> None:
        if centres.ndim != 2 or not widths.shape == amplitudes.shape == centres.shape[:1]:
            shapes = ", ".join(str(tuple(part.shape)) for part in (centres, widths, amplitudes))
            raise ValueError(f"centres, widths, amplitudes must be (k, d), (k,), (k,), got {shapes}")
        if not bool((widths > 0).all()):
            raise ValueError(f"widths must be positive, got {widths.tolist()}")

        def bumps(x: Tensor) -> Tensor:
            _require_points(x, centres.shape[1])
            distances = (x.unsqueeze(-2) - centres.to(x)).square().sum(-1)
            return (-0.5 * distances / widths.to(x).square()).exp() @ amplitudes.to(x)

        super().__init__(bumps)


class TanhReward(SmoothReward):
    """`r(x) = sum_j amplitudes[j] tanh(slopes[j]'x + offsets[j])`: bounded, and it depends on k directions only.

    `slopes` (k, d), `offsets` and `amplitudes` (k,). ValueError where shapes disagree.
    """

    def __init__(self, slopes: Tensor, offsets: Tensor, amplitudes: Tensor) -> None:
        if slopes.ndim != 2 or not offsets.shape == amplitudes.shape == slopes.shape[:1]:
            shapes = ", ".join(str(tuple(part.shape)) for part in (slopes, offsets, amplitudes))
            raise ValueError(f"slopes, offsets, amplitudes must be (k, d), (k,), (k,), got {shapes}")
        super().__init__(lambda z: (z + offsets.to(z)).tanh() @ amplitudes.to(z), slopes)


class QuadraticReward(SmoothReward):
    """`r(x) = -1/2 x'Qx + b'x + c`, with Q (d, d) symmetric (it may be indefinite), b (d,) and c a number.

    Sums and multiples of quadratic rewards stay quadratic, so that their tilts stay Gaussian mixtures.
    Raises ValueError where shapes disagree, a value is not finite, or Q is not symmetric.
    """

    def __init__(self, Q: Tensor, b: Tensor, c: Tensor | float | int = 0.0) -> None:
        if b.ndim != 1 or Q.shape != (len(b), len(b)):
            raise ValueError(f"Q must be (d, d) and b (d,), got shapes {tuple(Q.shape)} and {tuple(b.shape)}")
        dtype = torch.promote_types(Q.dtype, b.dtype)
        Q, b = Q.to(dtype), b.to(dtype)
        constant = torch.as_tensor(c, dtype=dtype, device=b.device)
        if constant.ndim != 0:
            raise ValueError(f"c must be one number, got shape {tuple(constant.shape)}")
        if not all(bool(part.isfinite().all()) for part in (Q, b, constant)):
            raise ValueError("Q, b and c must be finite, got NaN or infinity")
        if not torch.allclose(Q, Q.mT, rtol=1e-6, atol=0):
            raise ValueError(f"Q must be symmetric, got {Q.tolist()}; use (Q + Q.T) / 2")
        self.Q = 0.5 * (Q + Q.mT)
        self.b = b
        self.c = constant
        super().__init__(lambda x: ((self.b - 0.5 * x @ self.Q) * x).sum(-1) + self.c)
        # Qx and b'x determine the value.
        self.directions = torch.cat([self.Q, b.unsqueeze(0)])

    @property
    def dim(self) -> int:
        return len(self.b)

    def gradient(self, x: Tensor) -> Tensor:
        """`b - Qx`, (..., d), at the points `x` (..., d)."""
        _require_points(x, self.dim)
        return self.b - x @ self.Q

    def to(self, like: Tensor) -> QuadraticReward:
        if (self.b.dtype, self.b.device) == (like.dtype, like.device):
            return self
        return QuadraticReward(self.Q.to(like), self.b.to(like), self.c.to(like))

    @overload
    def __add__(self, other: QuadraticReward) -> QuadraticReward: ...
    @overload
    def __add__(self, other: Reward) -> Reward: ...
    def __add__(self, other: Reward) -> Reward:
        if not isinstance(other, QuadraticReward):
            return super().__add__(other)
        if other.dim != self.dim:
            raise ValueError(f"rewards of different dimensions cannot be added: {self.dim} and {other.dim}")
        return QuadraticReward(self.Q + other.Q, self.b + other.b, self.c + other.c)

    def __mul__(self, scale: float | int) -> QuadraticReward:
        return QuadraticReward(scale * self.Q, scale * self.b, scale * self.c)

    def __rmul__(self, scale: float | int) -> QuadraticReward:
        return self * scale


class LinearReward(QuadraticReward):
    """`r(x) = b'x + c`."""

    def __init__(self, b: Tensor, c: Tensor | float | int = 0.0) -> None:
        if b.ndim != 1:
            raise ValueError(f"b must be (d,), got shape {tuple(b.shape)}")
        super().__init__(torch.zeros(len(b), len(b), dtype=b.dtype, device=b.device), b, c)


def _require_points(x: Tensor, dim: int) -> None:
    if x.ndim == 0 or x.shape[-1] != dim:
        raise ValueError(f"points must be (..., {dim}), got shape {tuple(x.shape)}")
