"""Posterior expectations from Bayes' rule alone: prior density times Gaussian likelihood, summed on a
lattice.

The trapezoidal rule converges faster than any power on functions that fall like a Gaussian: a spacing of 0.7
standard deviations and a range of 8.5 leave an error below 1e-15. It uses none of the formulas under test:
the mixtures `around` say only where the mass lies and how wide it is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dbtheory.mixture import GaussianMixture
from dbtheory.reward import Reward
from dbtheory.schedule import NoiseSchedule

MAX_POINTS = 2_000_000


def lattice(around: Sequence[GaussianMixture], spacing: float = 0.7) -> Tensor:
    """Points (m, d) that cover and resolve every component of these mixtures."""
    spreads = [mixture.covariances.diagonal(dim1=-2, dim2=-1).sqrt() for mixture in around]
    pairs = list(zip(around, spreads, strict=True))
    low = torch.stack([(m.means - 8.5 * s).flatten(0, -2).amin(0) for m, s in pairs]).amin(0)
    high = torch.stack([(m.means + 8.5 * s).flatten(0, -2).amax(0) for m, s in pairs]).amax(0)
    step = spacing * min(mixture.eigenvalues.min().sqrt().item() for mixture in around)
    counts = (((high - low) / step).ceil() + 1).long()
    assert counts.prod() <= MAX_POINTS, f"a lattice of {counts.tolist()} points is too large for a test"
    axes = [low[i] + step * torch.arange(int(counts[i]), dtype=low.dtype) for i in range(len(low))]
    return torch.cartesian_prod(*axes).reshape(-1, len(low))


def log_posterior(prior: GaussianMixture, schedule: NoiseSchedule, x: Tensor, t: float, nodes: Tensor) -> Tensor:
    """Log of `p(x_0 | x_t = x)` at the nodes (m, d), normalised over them, for one point `x` (d,)."""
    residual = (x - schedule.alpha(t) * nodes).square().sum(-1)
    return (prior.log_prob(nodes) - 0.5 * residual / schedule.variance(t)).log_softmax(0)


class Bayes:
    """The three covariances of MATH.md 3 at one point `x` (d,), each under the same posterior weights."""

    def __init__(
        self,
        prior: GaussianMixture,
        schedule: NoiseSchedule,
        x: Tensor,
        t: float,
        around: Sequence[GaussianMixture],
        spacing: float = 0.7,
    ) -> None:
        self.nodes = lattice(around, spacing)
        self.log_weights = log_posterior(prior, schedule, x, t, self.nodes)
        self.weights = self.log_weights.exp()
        self.offsets = self.nodes - self.weights @ self.nodes
        self.scale = schedule.alpha(t) / schedule.variance(t)

    def control(self, reward: Reward, alpha: float) -> Tensor:
        return self._covariance(self._tilted(reward, alpha))

    def jensen_control(self, reward: Reward, alpha: float) -> Tensor:
        return self._covariance(self.weights * reward(self.nodes) / alpha)

    def jensen_gap(self, reward: Reward, alpha: float) -> Tensor:
        """One covariance, of the one variable `e^R/F - R`."""
        return self._covariance(self._tilted(reward, alpha) - self.weights * reward(self.nodes) / alpha)

    def _tilted(self, reward: Reward, alpha: float) -> Tensor:
        """Weights times `e^R/F`."""
        return (self.log_weights + reward(self.nodes) / alpha).softmax(0)

    def _covariance(self, weighted_values: Tensor) -> Tensor:
        centred = weighted_values - self.weights * weighted_values.sum()
        return self.scale * (centred @ self.offsets)
