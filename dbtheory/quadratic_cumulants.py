"""The law of a quadratic reward under a Gaussian mixture, by its generating function, in closed form (MATH.md 3, 5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from dbtheory.mixture import GaussianMixture, apply_each
from dbtheory.reward import QuadraticReward


@dataclass(frozen=True)
class QuadraticCumulants:
    """`K(p) = log E[e^(p (R - R(mean)))]` of a quadratic R, by components, in axes where its curvature is diagonal.

    Component k gives `p excess_k + sum_i [p^2 slope_i^2/(1 + p curvature_i) - log(1 + p curvature_i)]/2`.
    """

    log_weights: Float[Tensor, "n K"]
    excess: Float[Tensor, "n K"]  # R at the component's mean less R at the mixture's
    slopes: Float[Tensor, "n K d"]
    curvatures: Float[Tensor, "n K d"]

    @classmethod
    def of(cls, posterior: GaussianMixture, reward: QuadraticReward) -> QuadraticCumulants:
        root, mean = posterior.root, posterior.mean.unsqueeze(-2)
        curvatures, axes = torch.linalg.eigh(root.mT @ reward.Q @ root)
        gradients = reward.gradient(posterior.means)
        # a quadratic's rise is its mean gradient times the way: no digits of R cancel
        excess = (0.5 * (gradients + reward.gradient(mean)) * (posterior.means - mean)).sum(-1)
        slopes = apply_each(axes.mT, apply_each(root.mT, gradients))
        return cls(posterior.log_weights, excess, slopes, curvatures.expand_as(slopes))

    def __getitem__(self, rows: slice | Tensor) -> QuadraticCumulants:
        """The same for some of the points."""
        return QuadraticCumulants(self.log_weights[rows], self.excess[rows], self.slopes[rows], self.curvatures[rows])

    def split(self, rows: int) -> Iterator[QuadraticCumulants]:
        """The same for a few points after another."""
        return (self[i : i + rows] for i in range(0, max(1, len(self.excess)), rows))

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

    def component_means(self) -> Float[Tensor, "n K"]:
        """`E_k[R] - E[R]`."""
        means = self.excess - 0.5 * self.curvatures.sum(-1)
        return means - (self.log_weights.exp() * means).sum(-1, keepdim=True)

    def variance(self) -> Float[Tensor, " n"]:
        """`K''(0) = Var(R)`, within plus between the components."""
        within = (self.slopes.square() + 0.5 * self.curvatures.square()).sum(-1)
        return (self.log_weights.exp() * (within + self.component_means().square())).sum(-1)

    def spread(self, c: float) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """`sd(e^R/F - c R)`, and its square's share of the terms that make it up: the digits that are kept."""
        (first, slope), (second, _), (_, mean) = self.at(1.0), self.at(2.0), self.at(0.0)
        tilted, linear = (second - 2 * first).expm1(), c**2 * self.variance()
        square = (tilted - 2 * c * (slope - mean) + linear).clamp_min(0)
        return square.sqrt(), square / torch.maximum(tilted, linear)

    def generating_function(self, z: Complex[Tensor, "n arc"]) -> Complex[Tensor, "n arc"]:
        """`E[e^(z (R - E[R]))]` at complex z, up to a positive factor; `|z|` below `1/|curvature|`."""
        return self.terms(z).sum(1)

    def terms(self, z: Complex[Tensor, "n arc"]) -> Complex[Tensor, "n K arc"]:
        """The components' shares of `generating_function`, over their largest modulus at each z."""
        z = z[:, None, :, None]
        stretch = 1 + z * self.curvatures.unsqueeze(-2)
        log_stretch = torch.complex(stretch.abs().log(), stretch.angle())  # thrice as fast as log
        within = 0.5 * (z.square() * self.slopes.unsqueeze(-2).square() / stretch - log_stretch).sum(-1)
        logs = self.log_weights.unsqueeze(-1) + z.squeeze(-1) * self._values().unsqueeze(-1) + within
        return (logs - logs.real.amax(1, keepdim=True)).exp()

    def rates(self, z: Complex[Tensor, "n arc"]) -> Complex[Tensor, "n K arc"]:
        """Derivatives in z of the logs of these terms, before their largest modulus divides them."""
        z = z[:, None, :, None]
        curvatures, stretch = self.curvatures.unsqueeze(-2), 1 + z * self.curvatures.unsqueeze(-2)
        within = z * self.slopes.unsqueeze(-2).square() * (1 + stretch) / stretch.square() - curvatures / stretch
        return self._values().unsqueeze(-1) + 0.5 * within.sum(-1)

    def branch_point(self) -> Float[Tensor, " n"]:
        """The largest |z| below which every term is analytic; inf where R is linear."""
        return 1 / self.curvatures.abs().flatten(1).amax(-1)

    def arc(self, radius: Float[Tensor, " n"], count: int) -> Complex[Tensor, "n count"]:
        """Points of the upper half circle, dense as `1/|1 - u^2|^2`, `u = z/branch_point`, is: as phases turn."""
        angles = torch.linspace(0, torch.pi, count, dtype=radius.dtype, device=radius.device)
        graded = torch.atan2(self._flatness(radius).unsqueeze(-1) * angles.sin(), angles.cos())
        return radius.unsqueeze(-1) * torch.exp(1j * graded)

    def phase_rate(self, radius: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Bounds how fast a term's phase turns along `arc`, per unit of its angle before it is graded."""
        values, squares = self._values().abs().amax(-1), self.slopes.square().sum(-1).amax(-1)
        branching = self.slopes.shape[-1] * radius / self.branch_point()
        return (radius * values + 2 * radius.square() * squares + branching) / self._flatness(radius)

    def _values(self) -> Float[Tensor, "n K"]:
        """R at the component's mean less E[R]."""
        return self.component_means() + 0.5 * self.curvatures.sum(-1)

    def _flatness(self, radius: Tensor) -> Tensor:
        """The ratio of the axes by which angles crowd at 0 and pi; 1 where R is linear."""
        square = (radius / self.branch_point()).square()
        return (1 - square) / (1 + square)
