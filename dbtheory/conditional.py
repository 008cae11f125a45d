"""The clean sample given the noisy one, under the prior and under its tilt (MATH.md 3).

Everything is in the coordinates of the control, `y = (alpha_t/sigma_t^2) (x_0 - E[x_0|x])`. Where `x_0` is
`mean_k + root_k zeta` in component k, `y = centre_k + root_y_k zeta`, and by Tweedie's formula centre_k is
component k's score minus the mixture's. So no digits cancel as `sigma_t -> 0`, where `alpha_t/sigma_t^2`
grows without bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.mixture import GaussianMixture, apply_each
from dbtheory.quadrature import gauss_hermite, lattice
from dbtheory.reward import QuadraticReward, Reward, SmoothReward
from dbtheory.schedule import NoiseSchedule, Time, as_time
from dbtheory.tilt import Alpha, log_normalizer, require_alpha, require_quadratic, whitened_tilt

Rule = Literal["quadrature", "grid"]
_RULES = {"quadrature": gauss_hermite, "grid": lattice}
_CHUNK_ENTRIES = 2**22  # (point, component, node, coordinate): 32 MB in float64


def noise_ratio(schedule: NoiseSchedule, t: Time) -> Tensor:
    """`alpha_t / sigma_t^2`, shaped like `t`; ValueError at a time without noise."""
    variance = schedule.variance(t)
    if bool((variance <= 0).any()):
        raise ValueError(f"at a time without noise the posterior is a point: t must be in (0, 1], got {t}")
    return schedule.alpha(t) / variance


@dataclass(frozen=True)
class Conditional:
    """The posterior (one mixture for each of n points), `R = reward/alpha`, the control's coordinates."""

    posterior: GaussianMixture
    reward: Reward
    centres: Tensor  # (n, K, d)
    root_y: Tensor  # (..., K, d, d)
    rule: Rule
    order: int  # of the rule

    @classmethod
    def at(
        cls,
        prior: GaussianMixture,
        reward: Reward,
        alpha: Alpha,
        schedule: NoiseSchedule,
        x: Tensor,
        t: Time,
        rule: Rule,
        order: int,
    ) -> Conditional:
        """The conditional law at the points `x` (n, d), be there a target or not.

        ValueError for a time without noise, an alpha that is not positive, and points of another shape.
        """
        ratio = noise_ratio(schedule, as_time(t)).to(prior.means)
        posterior = prior.posterior(schedule, x, t)
        scores = prior.noised(schedule, t).component_scores(x)
        mean_score = (posterior.weights.unsqueeze(-1) * scores).sum(-2, keepdim=True)
        root_y = (ratio.reshape(-1, 1, 1, 1) if ratio.ndim else ratio) * posterior.root
        scaled = reward.to(prior.means) * (1 / require_alpha(alpha))
        return cls(posterior, scaled, scores - mean_score, root_y, rule, order)

    @classmethod
    def in_chunks(
        cls,
        prior: GaussianMixture,
        reward: Reward,
        alpha: Alpha,
        schedule: NoiseSchedule,
        x: Tensor,
        t: Time,
        rule: Rule,
        order: int,
    ) -> Iterator[Conditional]:
        """The same for a few points after another, so that the nodes of all points never stand in memory."""
        x, times = prior.noised(schedule, t).require_points(x), as_time(t)
        nodes = order ** dimensions(reward, prior.dim)
        # closed forms have a matrix for each point and component in place of the nodes
        rows = max(1, _CHUNK_ENTRIES // max(1, max(nodes, prior.dim) * prior.means.numel()))
        for i in range(0, max(1, len(x)), rows):
            mine = times[i : i + rows] if times.ndim else times
            yield cls.at(prior, reward, alpha, schedule, x[i : i + rows], mine, rule, order)

    # Moments of quadratic rewards, in closed form.

    def tilted_mean(self) -> Float[Tensor, "n d"]:
        """`Cov(e^R/F, y) = E[e^R y]/F`, the mean of y under the tilted posterior."""
        tilted = whitened_tilt(self.posterior, self.reward, 1)
        shares = (self.posterior.log_weights + tilted.log_normalizer).softmax(-1)
        return self._sum_components(shares, apply_each(self.root_y, tilted.shift))

    def reward_covariance(self) -> Float[Tensor, "n d"]:
        """`Cov(R, y)`: within each component by Stein's lemma, between them by their expected rewards."""
        reward = require_quadratic(self.reward, self.posterior.dim)
        weights, values = self.posterior.weights, self._component_rewards(reward)
        slopes = apply_each(self.posterior.root.mT, reward.gradient(self.posterior.means))
        within = (weights.unsqueeze(-1) * apply_each(self.root_y, slopes)).sum(-2)
        excess = values - (weights * values).sum(-1, keepdim=True)
        return within + ((weights * excess).unsqueeze(-1) * self.centres).sum(-2)

    # The same by a quadrature rule.

    def tilted_mean_by_quadrature(self) -> Float[Tensor, "n d"]:
        zeta, log_weights, reward = self._tilted_nodes
        shares = (log_weights + reward).flatten(1).softmax(-1).view_as(reward)
        return self._sum_nodes(shares, zeta)

    def reward_covariance_by_quadrature(self) -> Float[Tensor, "n d"]:
        zeta, log_weights, reward = self._nodes
        weights = log_weights.exp()
        excess = reward - (weights * reward).sum((-2, -1), keepdim=True)
        return self._sum_nodes(weights * excess, zeta)

    # What autograd differentiates in x.

    def log_expectation(self) -> Float[Tensor, " n"]:
        """`log E[e^R | x]`, closed where the reward is quadratic."""
        if isinstance(self.reward, QuadraticReward):
            return log_normalizer(self.posterior, self.reward, 1)
        _, log_weights, reward = self._nodes
        return (log_weights + reward).flatten(1).logsumexp(-1)

    def expectation(self) -> Float[Tensor, " n"]:
        """`E[R | x]`, closed where the reward is quadratic."""
        if isinstance(self.reward, QuadraticReward):
            return (self.posterior.weights * self._component_rewards(self.reward)).sum(-1)
        _, log_weights, reward = self._nodes
        return (log_weights.exp() * reward).sum((-2, -1))

    def log_jensen_ratio(self) -> Float[Tensor, " n"]:
        """`log E[e^R | x] - E[R | x] >= 0`, whose gradient is the gap."""
        return self.log_expectation() - self.expectation()

    def reward_rule(self) -> tuple[Float[Tensor, "n nodes"], Float[Tensor, "n nodes"], Float[Tensor, "n nodes d"]]:
        """Log weights, R and y at the nodes of the rule, for any other expectation of `f(R)` or of `f(R) y`."""
        zeta, log_weights, reward = self._nodes
        y = self.centres.unsqueeze(-2) + zeta @ self.root_y.mT
        return log_weights.flatten(1), reward.flatten(1), y.flatten(1, 2)

    def _component_rewards(self, reward: QuadraticReward) -> Tensor:
        """`E_k[R]`, (n, K)."""
        root = self.posterior.root
        return reward(self.posterior.means) - 0.5 * (root * (reward.Q @ root)).sum((-2, -1))

    @cached_property
    def _nodes(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rule on each posterior component: zeta (n, K, m, d), log weights (n, K, m) and R there.

        Where R depends on k < d directions, the rule is for the coordinates eta of zeta along them, and zeta stands
        for its mean given eta, `basis eta`: R and the first moment of zeta need no more.
        """
        dim = self.posterior.dim
        k = dimensions(self.reward, dim)
        points, log_weights = _RULES[self.rule](self.order, k, self.posterior.means)
        if k < dim:
            span = _span(self.reward).to(points)
            basis, _ = torch.linalg.qr((span @ self.posterior.root).mT)
            points = points @ basis.mT
        zeta = points.expand(*self.posterior.means.shape[:-1], *points.shape[-2:])
        return zeta, self.posterior.log_weights.unsqueeze(-1) + log_weights, self._reward_at(zeta)

    @cached_property
    def _tilted_nodes(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `_nodes`, but where `e^R` puts its mass: adaptive Gauss-Hermite, exact for `e^R` times polynomials.

        The weights carry the density ratio N(zeta; 0, I)/N(zeta; shift, factor factor'). Without it the plain
        rule needs many nodes at small alpha. Rewards that are not quadratic keep the plain rule.
        """
        if not isinstance(self.reward, QuadraticReward):
            return self._nodes
        points, log_weights = _RULES[self.rule](self.order, self.posterior.dim, self.posterior.means)
        tilted = whitened_tilt(self.posterior, self.reward, 1)
        zeta = tilted.shift.unsqueeze(-2) + points @ tilted.factor.mT
        log_volume = tilted.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).unsqueeze(-1)
        log_ratio = 0.5 * (points.square().sum(-1) - zeta.square().sum(-1)) + log_volume
        log_weights = self.posterior.log_weights.unsqueeze(-1) + log_weights + log_ratio
        return zeta, log_weights, self._reward_at(zeta)

    def _reward_at(self, zeta: Tensor) -> Tensor:
        x0 = self.posterior.means.unsqueeze(-2) + zeta @ self.posterior.root.mT
        values = self.reward(x0)
        if not bool(values.isfinite().all()):
            raise ValueError("the reward is NaN or infinite where the posterior has mass; bound it, e.g. by clamp")
        return values

    def _sum_nodes(self, shares: Tensor, zeta: Tensor) -> Tensor:
        """Sum of shares times y over components and nodes; shares (n, K, m) may be signed."""
        totals = shares.sum(-1, keepdim=True)
        within = apply_each(self.root_y, (shares.unsqueeze(-1) * zeta).sum(-2))
        return (totals * self.centres + within).sum(-2)

    def _sum_components(self, shares: Tensor, offsets: Tensor) -> Tensor:
        return (shares.unsqueeze(-1) * (self.centres + offsets)).sum(-2)


def _span(reward: Reward) -> Tensor:
    """An orthonormal basis (k, d) of the directions on which a smooth reward depends; (0, d) if it names none."""
    directions = reward.directions if isinstance(reward, SmoothReward) else None
    if directions is None:
        return torch.empty(0, 0)
    _, sizes, rows = torch.linalg.svd(directions, full_matrices=False)
    rounding = 16 * torch.finfo(sizes.dtype).eps * sizes.max()
    return rows[: max(1, int((sizes > rounding).sum()))]


def dimensions(reward: Reward, dim: int) -> int:
    """In how many of `dim` dimensions expectations of the reward must be summed; ValueError if it has others."""
    span = _span(reward)
    if len(span) and span.shape[1] != dim:
        raise ValueError(f"the reward has {span.shape[1]} coordinates and the prior {dim}")
    return len(span) or dim
