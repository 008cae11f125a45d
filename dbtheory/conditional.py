"""The clean sample given the noisy one, under the prior and under its tilt (MATH.md 3).

Everything is in the coordinates of the control, `y = (alpha_t/sigma_t^2) (x_0 - E[x_0|x])`. Where `x_0` is
`mean_k + root_k zeta` in component k, `y = centre_k + spread_k zeta`, and by Tweedie's formula centre_k is
component k's score minus the mixture's. So no digits cancel as `sigma_t -> 0`, where `alpha_t/sigma_t^2`
grows without bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from dbtheory.mixture import GaussianMixture, apply_each
from dbtheory.quadrature import gauss_hermite
from dbtheory.reward import QuadraticReward, Reward
from dbtheory.schedule import NoiseSchedule, Time, as_time
from dbtheory.tilt import Scale, log_normalizer, require_alpha, require_quadratic, whitened_tilt


def noise_ratio(schedule: NoiseSchedule, t: Time) -> Tensor:
    """`alpha_t / sigma_t^2`, shaped like `t`; ValueError at a time without noise."""
    variance = schedule.variance(t)
    if bool((variance <= 0).any()):
        raise ValueError(f"the control needs noise: t must be in (0, 1], got {t}")
    return schedule.alpha(t) / variance


@dataclass(frozen=True)
class Conditional:
    """The posterior (one mixture for each of n points), `R = reward/alpha`, the control's coordinates."""

    posterior: GaussianMixture
    reward: Reward
    centres: Tensor  # (n, K, d)
    spread: Tensor  # (..., K, d, d)
    order: int  # of the Gauss-Hermite rules

    @classmethod
    def at(
        cls,
        prior: GaussianMixture,
        reward: Reward,
        alpha: Scale,
        schedule: NoiseSchedule,
        x: Tensor,
        t: Time,
        order: int,
    ) -> Conditional:
        """The conditional law at the points `x` (n, d). Raises as `tilt`, whose target must exist."""
        if isinstance(reward, QuadraticReward):
            whitened_tilt(prior, reward, alpha)
        ratio = noise_ratio(schedule, as_time(t)).to(prior.means)
        posterior = prior.posterior(schedule, x, t)
        scores = prior.noised(schedule, t).component_scores(x)
        mean_score = (posterior.weights.unsqueeze(-1) * scores).sum(-2, keepdim=True)
        spread = (ratio.reshape(-1, 1, 1, 1) if ratio.ndim else ratio) * posterior.root
        scaled = reward.to(prior.means) * (1 / require_alpha(alpha))
        return cls(posterior, scaled, scores - mean_score, spread, order)

    # Moments of quadratic rewards, in closed form.

    def tilted_mean(self) -> Float[Tensor, "n d"]:
        """`Cov(e^R/F, y) = E[e^R y]/F`, the mean of y under the tilted posterior."""
        tilted = whitened_tilt(self.posterior, self.reward, 1)
        shares = (self.posterior.log_weights + tilted.log_normalizer).softmax(-1)
        return self._sum_components(shares, apply_each(self.spread, tilted.shift))

    def reward_covariance(self) -> Float[Tensor, "n d"]:
        """`Cov(R, y)`: within each component by Stein's lemma, between them by their expected rewards."""
        reward = require_quadratic(self.reward, self.posterior.dim)
        weights, values = self.posterior.weights, self._component_rewards(reward)
        slopes = apply_each(self.posterior.root.mT, reward.gradient(self.posterior.means))
        within = (weights.unsqueeze(-1) * apply_each(self.spread, slopes)).sum(-2)
        excess = values - (weights * values).sum(-1, keepdim=True)
        return within + ((weights * excess).unsqueeze(-1) * self.centres).sum(-2)

    # The same by Gauss-Hermite.

    def tilted_mean_by_quadrature(self) -> Float[Tensor, "n d"]:
        zeta, log_weights, reward = self._tilted_rule()
        shares = (log_weights + reward).flatten(1).softmax(-1).view_as(reward)
        return self._sum_nodes(shares, zeta)

    def reward_covariance_by_quadrature(self) -> Float[Tensor, "n d"]:
        zeta, log_weights, reward = self._rule()
        weights = log_weights.exp()
        excess = reward - (weights * reward).sum((-2, -1), keepdim=True)
        return self._sum_nodes(weights * excess, zeta)

    # What autograd differentiates in x.

    def log_expectation(self) -> Float[Tensor, " n"]:
        """`log E[e^R | x]`, closed where the reward is quadratic."""
        if isinstance(self.reward, QuadraticReward):
            return log_normalizer(self.posterior, self.reward, 1)
        _, log_weights, reward = self._rule()
        return (log_weights + reward).flatten(1).logsumexp(-1)

    def expectation(self) -> Float[Tensor, " n"]:
        """`E[R | x]`, closed where the reward is quadratic."""
        if isinstance(self.reward, QuadraticReward):
            return (self.posterior.weights * self._component_rewards(self.reward)).sum(-1)
        _, log_weights, reward = self._rule()
        return (log_weights.exp() * reward).sum((-2, -1))

    def log_jensen_ratio(self) -> Float[Tensor, " n"]:
        """`log E[e^R | x] - E[R | x] >= 0`, whose gradient is the gap."""
        return self.log_expectation() - self.expectation()

    def _component_rewards(self, reward: QuadraticReward) -> Tensor:
        """`E_k[R]`, (n, K)."""
        root = self.posterior.root
        return reward(self.posterior.means) - 0.5 * (root * (reward.Q @ root)).sum((-2, -1))

    def _rule(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gauss-Hermite on each posterior component: zeta (n, K, m, d), log weights (n, K, m) and R there."""
        points, log_weights = gauss_hermite(self.order, self.posterior.dim, self.posterior.means)
        zeta = points.expand(*self.posterior.means.shape[:-1], *points.shape)
        return zeta, self.posterior.log_weights.unsqueeze(-1) + log_weights, self._reward_at(zeta)

    def _tilted_rule(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `_rule`, with nodes where `e^R` puts its mass: adaptive Gauss-Hermite, exact for `e^R` times
        polynomials.

        The weights carry the density ratio N(zeta; 0, I)/N(zeta; shift, factor factor'). Without it the plain
        rule needs many nodes at small alpha. Rewards that are not quadratic keep the plain rule.
        """
        if not isinstance(self.reward, QuadraticReward):
            return self._rule()
        points, log_weights = gauss_hermite(self.order, self.posterior.dim, self.posterior.means)
        tilted = whitened_tilt(self.posterior, self.reward, 1)
        zeta = tilted.shift.unsqueeze(-2) + points @ tilted.factor.mT
        log_volume = tilted.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).unsqueeze(-1)
        log_ratio = 0.5 * (points.square().sum(-1) - zeta.square().sum(-1)) + log_volume
        log_weights = self.posterior.log_weights.unsqueeze(-1) + log_weights + log_ratio
        return zeta, log_weights, self._reward_at(zeta)

    def _reward_at(self, zeta: Tensor) -> Tensor:
        x0 = self.posterior.means.unsqueeze(-2) + zeta @ self.posterior.root.mT
        return self.reward(x0)

    def _sum_nodes(self, shares: Tensor, zeta: Tensor) -> Tensor:
        """Sum of shares times y over components and nodes; shares (n, K, m) may be signed."""
        totals = shares.sum(-1, keepdim=True)
        within = apply_each(self.spread, (shares.unsqueeze(-1) * zeta).sum(-2))
        return (totals * self.centres + within).sum(-2)

    def _sum_components(self, shares: Tensor, offsets: Tensor) -> Tensor:
        return (shares.unsqueeze(-1) * (self.centres + offsets)).sum(-2)
