"""How far `e^R/F` is from `c R`, `F = E[e^R]`: the standard deviation of their difference (MATH.md 5).

With `K(p) = log E[e^(pR)]`, for any law of R whose K(2) is finite:

    Var(e^R/F - c R) = e^(K(2) - 2 K(1)) - 1 - 2 c (K'(1) - K'(0)) + c^2 K''(0).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.conditional import Conditional, dimensions, noise_ratio
from dbtheory.control import conditionals, over_chunks
from dbtheory.coupling import Line, tilt_spread
from dbtheory.law import Law
from dbtheory.mixture import GaussianMixture
from dbtheory.quadratic_cumulants import QuadraticCumulants
from dbtheory.reward import QuadraticReward, Reward
from dbtheory.schedule import NoiseSchedule, Time, as_time
from dbtheory.tilt import Alpha, require_alpha, whitened_tilt

# Below this share of the terms that make up a closed variance, a rule of at most so many nodes replaces it.
_FEWEST_KEPT, _MOST_NODES = 1e-5, 5e4


@dataclass(frozen=True)
class Given:
    """`x_0` given `x_t = x` at the points `x` (n, d) and times `t` in (0, 1], a scalar or (n,)."""

    prior: GaussianMixture
    reward: Reward
    alpha: Alpha
    schedule: NoiseSchedule
    x: Tensor
    t: Time

    @classmethod
    def at(cls, prior: Law, reward: Reward, alpha: Alpha, schedule: NoiseSchedule, x: Tensor, t: Time) -> Given:
        """ValueError for a prior that is no Gaussian mixture; what else is wrong is found on use."""
        if not isinstance(prior, GaussianMixture):
            raise ValueError(
                f"the bounds need a GaussianMixture as prior, got {type(prior).__name__}; use a dense mixture"
            )
        if not len(x):
            raise ValueError("the bounds need at least one point, got none")
        return cls(prior, reward, alpha, schedule, x, t)

    @cached_property
    def R(self) -> Reward:
        """`reward/alpha`; ValueError where its tilt of the prior does not exist, if it is quadratic."""
        scaled = self.reward.to(self.prior.means) * (1 / require_alpha(self.alpha))
        if isinstance(scaled, QuadraticReward):
            whitened_tilt(self.prior, scaled, 1)
        return scaled

    @cached_property
    def posterior(self) -> GaussianMixture:
        """The law of `x_0`, one mixture for each point."""
        return self.prior.posterior(self.schedule, self.x, self.t)

    @cached_property
    def ratio(self) -> Tensor:
        """`alpha_t/sigma_t^2`, (1,) or (n,); ValueError at a time without noise."""
        return noise_ratio(self.schedule, as_time(self.t)).to(self.prior.means).reshape(-1)

    @cached_property
    def line(self) -> Line:
        """The posterior about its mean, on a line (d = 1), with R on its lattice; raises as `Line.of`."""
        posterior, mean, R = self.posterior, self.posterior.mean, self.R
        return Line.of(
            posterior.log_weights,
            (posterior.means - mean.unsqueeze(-2)).squeeze(-1),
            posterior.eigenvalues.sqrt().squeeze(-1),
            lambda offsets: R((mean + offsets).unsqueeze(-1)),
        )

    def spread(self, c: float) -> Float[Tensor, " n"]:
        """`sd(e^R/F - c R)` at each point.

        On a lattice in 1-D; else closed where the reward is quadratic, unless digits cancel: there R varies so little
        that a rule of few nodes is exact; else by the rule that `jensen_gap` takes, which cannot tell whether
        `E[e^(2R) | x]` is finite. ValueError where it is known to be infinite.
        """
        if self.prior.dim == 1:
            return self.line.spread(c)
        if not isinstance(self.R, QuadraticReward):
            return self._spread_by_rule(c, None, None)
        closed, kept = QuadraticCumulants.of(self.posterior, self.R).spread(c)
        if bool((kept > _FEWEST_KEPT).all()):
            return closed
        order = min(8, int(_MOST_NODES ** (1 / dimensions(self.R, self.prior.dim))))
        return torch.where(kept > _FEWEST_KEPT, closed, self._spread_by_rule(c, "quadrature", order))

    def _spread_by_rule(self, c: float, route: str | None, order: int | None) -> Tensor:
        def of(law: Conditional) -> Tensor:
            log_weights, reward, _ = law.reward_rule()
            return tilt_spread(log_weights, reward - (log_weights + reward).logsumexp(-1, keepdim=True), c)

        laws, _ = conditionals(self.prior, self.reward, self.alpha, self.schedule, self.t, route, order)
        return over_chunks(of, laws(self.x))
