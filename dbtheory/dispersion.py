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
from dbtheory.control import conditionals, each
from dbtheory.coupling import Line, tilt_spread
from dbtheory.law import Law
from dbtheory.mixture import GaussianMixture, apply_each
from dbtheory.reward import QuadraticReward, Reward
from dbtheory.schedule import NoiseSchedule, Time, as_time
from dbtheory.tilt import Scale, require_alpha, whitened_tilt

# Below this share of the terms that make up a closed variance, a rule of at most so many nodes replaces it.
_FEWEST_KEPT, _MOST_NODES = 1e-5, 5e4


@dataclass(frozen=True)
class Given:
    """`x_0` given `x_t = x` at the points `x` (n, d) and times `t` in (0, 1], a scalar or (n,)."""

    prior: GaussianMixture
    reward: Reward
    alpha: Scale
    schedule: NoiseSchedule
    x: Tensor
    t: Time

    @classmethod
    def at(cls, prior: Law, reward: Reward, alpha: Scale, schedule: NoiseSchedule, x: Tensor, t: Time) -> Given:
        """ValueError for a prior that is no Gaussian mixture; what else is wrong is found on use."""
        if not isinstance(prior, GaussianMixture):
            raise ValueError(
                f"the bounds need a GaussianMixture as prior, got {type(prior).__name__}; use a dense mixture"
            )
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
            log_weights, reward = law.reward_rule()
            return tilt_spread(log_weights, reward - (log_weights + reward).logsumexp(-1, keepdim=True), c)

        laws, _ = conditionals(self.prior, self.reward, self.alpha, self.schedule, self.t, route, order)
        return each(of, laws(self.x))


@dataclass(frozen=True)
class QuadraticCumulants:
    """`K(p) = log E[e^(p (R - R(mean)))]` of a quadratic R, by components, in axes where its curvature is diagonal.

    Component k gives `p excess_k + sum_i [p^2 slope_i^2/(1 + p curvature_i) - log(1 + p curvature_i)]/2`.
    """

    log_weights: Float[Tensor, "n K"]
    excess: Float[Tensor, "n K"]  # R at the component's mean less R at the mixture's
    slopes: Float[Tensor, "n K d"]
    curvatures: Float[Tensor, "*n K d"]

    @classmethod
    def of(cls, posterior: GaussianMixture, reward: QuadraticReward) -> QuadraticCumulants:
        root, mean = posterior.root, posterior.mean.unsqueeze(-2)
        curvatures, axes = torch.linalg.eigh(root.mT @ reward.Q @ root)
        gradients = reward.gradient(posterior.means)
        # a quadratic's rise is its mean gradient times the way: no digits of R cancel
        excess = (0.5 * (gradients + reward.gradient(mean)) * (posterior.means - mean)).sum(-1)
        slopes = apply_each(axes.mT, apply_each(root.mT, gradients))
        return cls(posterior.log_weights, excess, slopes, curvatures)

    def at(self, p: float) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """`K(p)` and `K'(p)`; ValueError where `E[e^(pR)]` is infinite."""
        scale = 1 + p * self.curvatures
        if bool((scale <= 0).any()):
            raise ValueError(
                f"E[e^({p:g} R) | x] is infinite: a component's precision + {p:g} Q/alpha is not positive definite; "
                "raise alpha or use a reward that grows more slowly"
            )
        squares = self.slopes.square()
        values = p * self.excess + 0.5 * (p**2 * squares / scale - (p * self.curvatures).log1p()).sum(-1)
        rates = p * squares * (1 + scale) / scale.square() - self.curvatures / scale
        shares = (self.log_weights + values).softmax(-1)
        return (self.log_weights + values).logsumexp(-1), (shares * (self.excess + 0.5 * rates.sum(-1))).sum(-1)

    def variance(self) -> Float[Tensor, " n"]:
        """`K''(0) = Var(R)`, within plus between the components."""
        means = self.excess - 0.5 * self.curvatures.sum(-1)
        within = (self.slopes.square() + 0.5 * self.curvatures.square()).sum(-1)
        weights = self.log_weights.exp()
        between = means - (weights * means).sum(-1, keepdim=True)
        return (weights * (within + between.square())).sum(-1)

    def spread(self, c: float) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """`sd(e^R/F - c R)`, and its square's share of the terms that make it up: the digits that are kept."""
        (first, slope), (second, _), (_, mean) = self.at(1.0), self.at(2.0), self.at(0.0)
        tilted, linear = (second - 2 * first).expm1(), c**2 * self.variance()
        square = (tilted - 2 * c * (slope - mean) + linear).clamp_min(0)
        return square.sqrt(), square / torch.maximum(tilted, linear)
