"""The law of the reward given the noisy sample, and how it moves with it (MATH.md 5).

With `y = (alpha_t/sigma_t^2)(x_0 - E[x_0|x]) = grad_x log p(x_0|x)`, the density of R given x obeys

    grad_x log p_R(r|x) = E[y | R = r, x].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.coupling import Line
from dbtheory.dispersion import Given
from dbtheory.mixture import apply_each
from dbtheory.reward import QuadraticReward, Reward, SmoothReward

# The largest of p_R, r p_R and e^r p_R at the lattice's ends, in units of F and sd(R), that counts as vanishing.
_LOG_VANISHED = math.log(1e-8)


class HypothesisError(ValueError):
    """The hypothesis of a lemma does not hold, so its bound does not apply."""


@dataclass(frozen=True)
class RewardLaw:
    """`p_R(r|x)` through its two scores, on the nodes of a `Line`: of x_0 in 1-D, else of R itself."""

    line: Line
    score_x: Float[Tensor, "n m d"]  # grad_x log p_R(r|x)
    score_r: Float[Tensor, "n m"]  # d_r log p_R(r|x)

    @classmethod
    def of(cls, given: Given) -> RewardLaw:
        """HypothesisError unless R is linear, or strictly monotone in 1-D with p_R, r p_R and e^r p_R vanishing."""
        R, dim = given.R, given.prior.dim
        if isinstance(R, QuadraticReward) and not bool(R.Q.any()):
            return _linear(given, R.b)
        if dim == 1 and not isinstance(R, QuadraticReward):
            return _monotone(given)
        raise HypothesisError(
            f"a {type(R).__name__} in {dim} dimensions is not known to have a density that vanishes at the ends of its "
            "support, as its maximum or minimum puts mass there; use a LinearReward, a monotone reward in one "
            "dimension, or covariance_bound, which needs no density"
        )


def derivatives(reward: Reward, x: Tensor) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"]]:
    """R' and R'' at the points `x` (n, m) of a line. HypothesisError for a reward that does not promise to have them:
    autograd sees neither a jump nor a kink, and what follows would be wrong without a sign of it."""
    if not isinstance(reward, SmoothReward):
        raise HypothesisError(
            f"a {type(reward).__name__} promises no derivatives; wrap it in SmoothReward if it is analytic, or use "
            "covariance_bound, which needs none"
        )
    with torch.enable_grad():
        points = x.detach().requires_grad_(True)
        (first,) = torch.autograd.grad(reward(points.unsqueeze(-1)).sum(), points, create_graph=True)
        second = torch.zeros_like(first)
        if first.requires_grad:
            (second,) = torch.autograd.grad(first.sum(), points, materialize_grads=True)
    return first.detach(), second


def _monotone(given: Given) -> RewardLaw:
    """Change of variables: `p_R(R(x_0)) = p(x_0)/|R'(x_0)|`."""
    line = given.line
    slope, curvature = derivatives(given.R, given.posterior.mean + line.offsets)
    if not bool(((slope > 0).all(-1) | (slope < 0).all(-1)).all()):
        raise HypothesisError(
            "on a line the density of R needs a strictly monotone reward: at a maximum or minimum p_R is infinite at "
            "the end of its support; use covariance_bound or pathwise_lemma"
        )
    _require_vanishing(line, slope)
    pull = -(line.shares.exp() * line.standard / line.deviations.unsqueeze(-2)).sum(-1)
    score_x = given.ratio.unsqueeze(-1) * line.offsets
    return RewardLaw(line, score_x.unsqueeze(-1), (pull - curvature / slope) / slope)


def _require_vanishing(line: Line, slope: Tensor) -> None:
    deviation = line.mean(line.excess.square()).sqrt().unsqueeze(-1)
    factors = torch.stack([torch.zeros_like(slope), (line.excess / deviation).abs().log(), line.log_ratio]).amax(0)
    ends = (line.log_density - slope.abs().log() + deviation.log() + factors)[:, [0, -1]]
    if not bool((ends <= _LOG_VANISHED).all()):
        raise HypothesisError(
            f"p_R, r p_R or e^r p_R does not vanish at an end of R's support: it is {ends.max().exp().item():.3g} "
            "there, in units of F and sd(R); use covariance_bound or pathwise_lemma"
        )


def _linear(given: Given, b: Tensor) -> RewardLaw:
    """R is a Gaussian mixture on a line: `E_k[y | R = r] = E_k[y] + Cov_k(y, R) (r - E_k[R])/Var_k(R)`."""
    posterior, ratio = given.posterior, given.ratio.reshape(-1, 1, 1)
    slopes = (posterior.root.mT @ b).expand_as(posterior.means)
    deviations = slopes.norm(dim=-1)
    if not bool((deviations > 0).all()):
        raise HypothesisError("a constant reward has no density; use covariance_bound, which is 0 there")
    offsets = posterior.means - posterior.mean.unsqueeze(-2)
    line = Line.of(posterior.log_weights, offsets @ b, deviations, lambda rise: rise)
    shares, centres = line.shares.exp(), ratio * offsets
    pulls = ratio * apply_each(posterior.root, slopes) / deviations.unsqueeze(-1)
    score_x = shares @ centres + (shares * line.standard) @ pulls
    return RewardLaw(line, score_x, -(shares * line.standard / deviations.unsqueeze(-2)).sum(-1))
