"""The clean sample given the noisy one under a prior on a grid: ratios of noised densities (paper Proposition 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dbtheory.grid import GridLaw, NoisedGrid
from dbtheory.reward import Reward
from dbtheory.schedule import NoiseSchedule, Time
from dbtheory.tilt import Alpha, require_alpha


class _Ratio(NamedTuple):
    """`E[weight(x_0) | x_t = x]` for a positive weight: its log (n,) and the log's gradient (n, d)."""

    log: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class GridConditional:
    """`E[e^R | x] = Z p_target(x_t) / p_prior(x_t)`, both densities on the same grid; `E[R | x]` likewise, with the
    weight `R - floor > 0` in place of `e^R`."""

    tilted: _Ratio
    linear: _Ratio
    floor: Tensor

    @classmethod
    def at(
        cls, prior: GridLaw, reward: Reward, alpha: Alpha, schedule: NoiseSchedule, x: Tensor, t: Time
    ) -> GridConditional:
        """The conditional law at the points `x` (n, d). Raises as `tilt`."""
        values = reward.to(prior.nodes)(prior.nodes).detach() * (1 / require_alpha(alpha))
        # As far below the smallest value as that lies below the largest: the weight varies by a factor of two.
        floor = 2 * values.min() - values.max() - 1
        noised = prior.noised(schedule, t)
        log_prob, score = noised.log_prob_and_score(x)

        def ratio(log_weight: Tensor) -> _Ratio:
            weighted = prior.reweighted(log_weight)
            top: NoisedGrid = weighted.noised(schedule, t)
            log_top, score_top = top.log_prob_and_score(x)
            return _Ratio(weighted.log_mass + log_top - log_prob, score_top - score)

        return cls(ratio(values), ratio((values - floor).log()), floor)

    def control(self) -> Tensor:
        return self.tilted.gradient

    def jensen_control(self) -> Tensor:
        return self.linear.log.exp().unsqueeze(-1) * self.linear.gradient

    def log_expectation(self) -> Tensor:
        return self.tilted.log

    def expectation(self) -> Tensor:
        return self.floor + self.linear.log.exp()
