"""What every law of the exact core offers, be it a Gaussian mixture or a density on a grid."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# python 3.11's own work every property out to see whether it is there
from typing_extensions import Protocol, runtime_checkable

from dbtheory.schedule import NoiseSchedule, Time


@runtime_checkable
class Density(Protocol):
    """A density with its gradient: all that is asked of a noised law."""

    def log_prob(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Log density at the points `x` (n, d)."""
        ...

    def score(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """`grad_x log p(x)` at the points `x` (n, d)."""
        ...


@runtime_checkable
class Law(Density, Protocol):
    """A law of clean samples in d dimensions, which can be noised exactly."""

    @property
    def dim(self) -> int: ...
    @property
    def mean(self) -> Float[Tensor, " d"]: ...
    @property
    def covariance(self) -> Float[Tensor, "d d"]: ...

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """`n` independent draws."""
        ...

    def noised(self, schedule: NoiseSchedule, t: Time) -> Density:
        """The law of `x_t = alpha(t) x_0 + sigma(t) z`; `t` is a scalar, or (n,), one time a point."""
        ...
