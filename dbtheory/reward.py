"""Rewards: functions of a clean sample that can be added and scaled (MATH.md 2)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

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
        return FunctionReward(lambda x: self(x) + other(x))

    def __radd__(self, other: int) -> Reward:
        # sum(rewards) starts from 0.
        return self if other == 0 else NotImplemented

    def __mul__(self, scale: float | int) -> Reward:
        return FunctionReward(lambda x: scale * self(x))

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
                f"{tuple(x.shape)}; sum over the last axis"
            )
        return values


class QuadraticReward(Reward):
    """`r(x) = -1/2 x'Qx + b'x + c`, with Q (d, d) symmetric (it may be indefinite), b (d,) and c a number.

    Sums and multiples of quadratic rewards stay quadratic, so that their tilts stay Gaussian mixtures.
    Raises ValueError where shapes disagree, a value is not finite, or Q is not symmetric.
    """

    def __init__(self, Q: Tensor, b: Tensor, c: Tensor | float | int = 0.0) -> None:
        if b.ndim != 1 or Q.shape != (len(b), len(b)):
            raise ValueError(f"Q must be (d, d) and b (d,), got shapes {tuple(Q.shape)} and {tuple(b.shape)}")
        constant = torch.as_tensor(c, dtype=b.dtype, device=b.device)
        if constant.ndim != 0:
            raise ValueError(f"c must be one number, got shape {tuple(constant.shape)}")
        if not all(bool(part.isfinite().all()) for part in (Q, b, constant)):
            raise ValueError("Q, b and c must be finite, got NaN or infinity")
        if not torch.allclose(Q, Q.mT, rtol=1e-6, atol=0):
            raise ValueError(f"Q must be symmetric, got {Q.tolist()}; use (Q + Q.T) / 2")
        self.Q = 0.5 * (Q + Q.mT)
        self.b = b
        self.c = constant

    @property
    def dim(self) -> int:
        return len(self.b)

    def __call__(self, x: Tensor) -> Tensor:
        self._require_points(x)
        return ((self.b - 0.5 * x @ self.Q) * x).sum(-1) + self.c

    def gradient(self, x: Tensor) -> Tensor:
        """`b - Qx`, (..., d), at the points `x` (..., d)."""
        self._require_points(x)
        return self.b - x @ self.Q

    def to(self, like: Tensor) -> QuadraticReward:
        return QuadraticReward(self.Q.to(like), self.b.to(like), self.c.to(like))

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

    def _require_points(self, x: Tensor) -> None:
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"points must be (..., {self.dim}), got shape {tuple(x.shape)}")


class LinearReward(QuadraticReward):
    """`r(x) = b'x + c`."""

    def __init__(self, b: Tensor, c: Tensor | float | int = 0.0) -> None:
        if b.ndim != 1:
            raise ValueError(f"b must be (d,), got shape {tuple(b.shape)}")
        super().__init__(torch.zeros(len(b), len(b), dtype=b.dtype, device=b.device), b, c)
