"""Laws on a line: one lattice for all their integrals, and the quantile coupling of the posteriors (MATH.md 5).

`x_0 = T_x(omega)` with omega uniform and `T_x` the quantile function of `p(x_0 | x_t = x)` moves every quantile
smoothly with x. Differentiating `P(x_0 <= T_x(omega) | x) = omega`, with `d/dx log p(x_0|x) = y` by Tweedie:

    dT_x/dx = E[y 1(x_0 > T_x)] / p(T_x|x),    y = (alpha_t/sigma_t^2) (x_0 - E[x_0|x]).

Between well separated components the density is small and the quantiles there move fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# A lattice ends where the law and its tilts by e^R and e^2R have fallen by e^-100 of their largest value; it is
# looked for up to 4,000 standard deviations away.
_DEPTH, _COARSE = 100.0, torch.linspace(-9, 9, 512, dtype=torch.float64).sinh()
# Nodes for each standard deviation of the narrowest component, and how many there are in all.
_RESOLUTION, _FEWEST, _MOST = 16, 513, 2**16


@dataclass(frozen=True)
class Line:
    """A Gaussian mixture for each of n rows, in offsets u from its mean, on m equally spaced nodes, with R there.

    The trapezoidal rule on analytic functions that fall like a Gaussian: it converges faster than any power.
    """

    offsets: Float[Tensor, "n m"]
    log_density: Float[Tensor, "n m"]
    shares: Float[Tensor, "n m K"]  # log of each component's part of the density
    standard: Float[Tensor, "n m K"]  # (u - centre_k)/deviation_k
    centres: Float[Tensor, "n K"]
    deviations: Float[Tensor, "n K"]
    reward: Float[Tensor, "n m"]

    @classmethod
    def of(cls, log_weights: Tensor, centres: Tensor, deviations: Tensor, reward: Callable[[Tensor], Tensor]) -> Line:
        """The mixtures `sum_k exp(log_weights) N(centres, deviations^2)`, (n, K) each, whose means are 0.

        `reward` maps offsets (n, m) to R (n, m). Raises ValueError where `E[e^2R]` does not exist and where the
        components are too narrow for a lattice over all the mass.
        """
        deviations = deviations.expand_as(centres)

        def density(offsets: Tensor) -> tuple[Tensor, Tensor]:
            standard = (offsets.unsqueeze(-1) - centres.unsqueeze(-2)) / deviations.unsqueeze(-2)
            log_scale = log_weights - deviations.log() - 0.5 * math.log(2 * math.pi)
            return log_scale.unsqueeze(-2) - 0.5 * standard.square(), standard

        total = (log_weights.exp() * (deviations.square() + centres.square())).sum(-1).sqrt()
        low, high = _range(lambda u: density(u)[0].logsumexp(-1), reward, total)
        wanted = _RESOLUTION * float(((high - low) / deviations.amin(-1)).max())
        if not wanted <= _MOST:
            raise ValueError(
                f"a lattice over the posterior and its tilts would need {wanted:.3g} nodes; raise alpha, or use a "
                "prior whose components differ less in width"
            )
        steps = torch.linspace(0, 1, max(_FEWEST, math.ceil(wanted)), dtype=centres.dtype, device=centres.device)
        offsets = low.unsqueeze(-1) + (high - low).unsqueeze(-1) * steps
        joint, standard = density(offsets)
        log_density = joint.logsumexp(-1)
        shares = joint - log_density.unsqueeze(-1)
        return cls(offsets, log_density, shares, standard, centres, deviations, reward(offsets))

    @property
    def log_weights(self) -> Float[Tensor, "n m"]:
        """Log of the nodes' weights in an expectation, which sum to 1."""
        return self.log_density.log_softmax(-1)

    @property
    def log_ratio(self) -> Float[Tensor, "n m"]:
        """`log(e^R/F)`, `F = E[e^R]`: R less a constant."""
        return self.reward - (self.log_weights + self.reward).logsumexp(-1, keepdim=True)

    @property
    def excess(self) -> Float[Tensor, "n m"]:
        """`R - E[R]`."""
        return self.reward - self.mean(self.reward).unsqueeze(-1)

    def mean(self, values: Tensor) -> Tensor:
        """`E[values]` of values (n, m) or (n, m, d)."""
        return torch.einsum("nm,nm...->n...", self.log_weights.exp(), values)

    def tilt_mean(self, values: Tensor) -> Tensor:
        """`E[(e^R/F - 1) values]` of values (n, m) or (n, m, d)."""
        return torch.einsum("nm,nm...->n...", scaled_expm1(self.log_weights, self.log_ratio), values)

    def spread(self, c: Tensor | float) -> Float[Tensor, " n"]:
        """`sd(e^R/F - c R)`, `c` a number or (n, 1)."""
        return tilt_spread(self.log_weights, self.log_ratio, c)

    def quantile_slope(self, ratio: Tensor) -> Float[Tensor, "n m"]:
        """`dT_x/dx` at the nodes, for a posterior on a line; `ratio = alpha_t/sigma_t^2`, a scalar or (n, 1).

        Each component gives `deviation (deviation - centre Phi/phi)` left of the mean, and its mirror image right
        of it: the tails cancel no digits.
        """
        right = (self.offsets > 0).unsqueeze(-1)
        z = torch.where(right, -self.standard, self.standard)
        log_mills = torch.special.log_ndtr(z) + 0.5 * z.square() + 0.5 * math.log(2 * math.pi)
        centres, deviations = self.centres.unsqueeze(-2), self.deviations.unsqueeze(-2)
        within = self.shares.exp() * deviations.square()
        between = torch.where(right, centres, -centres) * deviations * (self.shares + log_mills).exp()
        return ratio * (within + between).sum(-1)


def _range(
    log_density: Callable[[Tensor], Tensor], reward: Callable[[Tensor], Tensor], deviation: Tensor
) -> tuple[Tensor, Tensor]:
    """The ends (n,) of the offsets that matter to expectations of 1, e^R and e^2R."""
    grid = deviation.unsqueeze(-1) * _COARSE.to(deviation)
    base, slope = log_density(grid), reward(grid)
    alive = torch.zeros_like(base, dtype=torch.bool)
    for power in (0, 1, 2):
        tilted = base + power * slope
        alive |= ~(tilted < tilted.amax(-1, keepdim=True) - _DEPTH)
    if bool((alive[:, 0] | alive[:, -1]).any()):
        raise ValueError(
            "the reward grows too fast for these bounds: E[e^(2R) | x] must be finite, R = reward/alpha; raise "
            "alpha, or use a reward that grows more slowly"
        )
    first = alive.int().argmax(-1, keepdim=True) - 1
    last = len(_COARSE) - alive.flip(-1).int().argmax(-1, keepdim=True)
    return grid.gather(-1, first).squeeze(-1), grid.gather(-1, last).squeeze(-1)


def tilt_spread(
    log_weights: Float[Tensor, "n m"], log_ratio: Float[Tensor, "n m"], c: Tensor | float
) -> Float[Tensor, " n"]:
    """`sd(e^R/F - c R)` under any rule with these weights, where `log_ratio = log(e^R/F)`; inf where it overflows.

    At c = 1 the terms of e^R/F linear in R cancel node by node, not in a difference of moments.
    """
    half = 0.5 * log_weights
    values = scaled_expm1(half, log_ratio) - c * half.exp() * log_ratio
    mean = (scaled_expm1(log_weights, log_ratio) - c * log_weights.exp() * log_ratio).sum(-1, keepdim=True)
    return (values - half.exp() * mean).norm(dim=-1)


def scaled_expm1(log_scale: Tensor, exponent: Tensor) -> Tensor:
    """`e^log_scale (e^exponent - 1)`, where one factor may overflow while the other vanishes."""
    scale = log_scale.exp()
    return torch.where(exponent < 1, scale * exponent.expm1(), (log_scale + exponent).exp() - scale)
