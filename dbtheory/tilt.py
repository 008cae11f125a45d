"""Exponential tilts of Gaussian mixtures by quadratic rewards, in closed form (paper eq. 6; MATH.md 2)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.mixture import GaussianMixture, apply_each
from dbtheory.reward import QuadraticReward, Reward

Scale = Tensor | float | int


class WhitenedTilt(NamedTuple):
    """What `exp(r/alpha)` does to each component, in coordinates `zeta` with `x = mean + root zeta`.

    There the component is N(0, I) and its tilt is N(shift, factor factor').
    """

    root: Tensor  # (..., K, d, d), root root' = covariance
    shift: Tensor  # (..., K, d)
    factor: Tensor  # (..., K, d, d)
    log_normalizer: Tensor  # (..., K): log E_k[exp(r/alpha)]


def tilt(prior: GaussianMixture, reward: Reward, alpha: Scale) -> GaussianMixture:
    """The target `p(x) exp(reward(x)/alpha) / Z`, again a Gaussian mixture (paper eq. 6).

    With one mixture for each row (a posterior), tilts each. Raises ValueError where alpha is not positive and
    finite, where the reward is not quadratic or has another dimension, and where some component's precision
    plus Q/alpha is not positive definite (no such target exists).
    """
    parts = whitened_tilt(prior, reward, alpha)
    means = prior.means + apply_each(parts.root, parts.shift)
    # The singular values of root factor give the covariance's eigenvalues without squaring its condition.
    eigenvectors, singular_values, _ = torch.linalg.svd(parts.root @ parts.factor)
    log_weights = prior.log_weights + parts.log_normalizer
    return GaussianMixture.from_eigen(log_weights, means, singular_values.square(), eigenvectors)


def log_normalizer(prior: GaussianMixture, reward: Reward, alpha: Scale) -> Float[Tensor, "*n"]:
    """`log E_prior[exp(reward/alpha)]`: a scalar, or (n,) with one mixture for each row. Raises as `tilt`."""
    return (prior.log_weights + whitened_tilt(prior, reward, alpha).log_normalizer).logsumexp(-1)


def whitened_tilt(prior: GaussianMixture, reward: Reward, alpha: Scale) -> WhitenedTilt:
    """The tilt of each component of `prior`, before they are put together. Raises as `tilt`."""
    scaled = require_quadratic(reward, prior.dim).to(prior.means) * (1 / require_alpha(alpha))
    root = prior.root
    precision = torch.eye(prior.dim).to(root) + root.mT @ scaled.Q @ root
    cholesky, failed = torch.linalg.cholesky_ex(precision)
    pivots = cholesky.diagonal(dim1=-2, dim2=-1)
    rounding = 16 * torch.finfo(precision.dtype).eps * precision.diagonal(dim1=-2, dim2=-1).abs()
    if bool((failed.bool() | (pivots.square() <= rounding).any(-1)).any()):
        raise ValueError(
            "the tilt does not exist: a component's precision + Q/alpha is not positive definite, "
            f"smallest whitened eigenvalue {torch.linalg.eigvalsh(precision).min().item():.3g}; "
            "raise alpha or use a reward that grows more slowly"
        )
    identity = torch.eye(prior.dim).to(root).expand_as(cholesky)
    factor = torch.linalg.solve_triangular(cholesky, identity, upper=False).mT
    slope = apply_each(factor.mT, apply_each(root.mT, scaled.gradient(prior.means)))
    log_mass = scaled(prior.means) + 0.5 * slope.square().sum(-1) - pivots.log().sum(-1)
    return WhitenedTilt(root, apply_each(factor, slope), factor, log_mass)


def require_alpha(alpha: Scale) -> float:
    """`alpha` as a float; ValueError unless positive and finite."""
    value = float(alpha)
    if not 0 < value < math.inf:
        raise ValueError(f"alpha, the strength of the KL term, must be positive and finite, got {value}")
    return value


def require_quadratic(reward: Reward, dim: int) -> QuadraticReward:
    """The reward itself; ValueError unless it is quadratic with `dim` coordinates."""
    if not isinstance(reward, QuadraticReward):
        raise ValueError(f"a closed form needs a QuadraticReward, got {type(reward).__name__}; use quadrature")
    if reward.dim != dim:
        raise ValueError(f"the reward has {reward.dim} coordinates and the mixture {dim}")
    return reward
