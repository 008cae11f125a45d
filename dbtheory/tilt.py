"""The target `p(x) exp(r(x)/alpha)/Z` (paper eq. 6; MATH.md 2): a Gaussian mixture where the reward is quadratic, a
grid in one and two dimensions for any other."""

from __future__ import annotations

import math
from typing import NamedTuple, overload

import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.definite import definite_cholesky
from dbtheory.grid import GridLaw
from dbtheory.law import Law
from dbtheory.mixture import GaussianMixture, apply_each
from dbtheory.reward import QuadraticReward, Reward
from dbtheory.window import fitted_grid

Alpha = Tensor | float | int  # the strength of the KL term


class WhitenedTilt(NamedTuple):
    """What `exp(r/alpha)` does to each component, in coordinates `zeta` with `x = mean + root zeta`.

    There the component is N(0, I) and its tilt is N(shift, factor factor').
    """

    root: Tensor  # (..., K, d, d), root root' = covariance
    shift: Tensor  # (..., K, d)
    factor: Tensor  # (..., K, d, d)
    log_normalizer: Tensor  # (..., K): log E_k[exp(r/alpha)]


@overload
def tilt(prior: GaussianMixture, reward: QuadraticReward, alpha: Alpha) -> GaussianMixture: ...
@overload
def tilt(prior: Law, reward: Reward, alpha: Alpha) -> Law: ...
def tilt(prior: Law, reward: Reward, alpha: Alpha) -> Law:
    """The target `p(x) exp(reward(x)/alpha) / Z` (paper eq. 6).

    A Gaussian mixture and a quadratic reward give a Gaussian mixture, exactly; with one mixture for each row (a
    posterior), each is tilted. Anything else in one or two dimensions gives a `GridLaw`, on the prior's own grid
    if it has one; see its `discretisation_error`. Raises ValueError where alpha is not positive and finite, where
    the reward has another dimension, where no such target exists (a component's precision plus Q/alpha is not
    positive definite; the mass leaves every window), and where a grid is needed in more than two dimensions or
    cannot resolve the target.
    """
    if isinstance(prior, GaussianMixture) and isinstance(reward, QuadraticReward):
        return _tilted_mixture(prior, reward, alpha)
    return _tilted_grid(prior, reward, alpha)


def _tilted_mixture(prior: GaussianMixture, reward: QuadraticReward, alpha: Alpha) -> GaussianMixture:
    parts = whitened_tilt(prior, reward, alpha)
    means = prior.means + apply_each(parts.root, parts.shift)
    # The singular values of root factor give the covariance's eigenvalues without squaring its condition.
    eigenvectors, singular_values, _ = torch.linalg.svd(parts.root @ parts.factor)
    log_weights = prior.log_weights + parts.log_normalizer
    return GaussianMixture.from_eigen(log_weights, means, singular_values.square(), eigenvectors)


def _tilted_grid(prior: Law, reward: Reward, alpha: Alpha) -> GridLaw:
    inverse = 1 / require_alpha(alpha)
    if isinstance(prior, GridLaw):
        return prior.reweighted(reward.to(prior.nodes)(prior.nodes) * inverse)
    if not isinstance(prior, GaussianMixture) or prior.is_batched or prior.dim > 2:
        raise ValueError(
            f"a {type(reward).__name__} tilts single laws in one or two dimensions, on a grid, got a "
            f"{type(prior).__name__} with a mean of shape {tuple(prior.mean.shape)}; use a QuadraticReward, or "
            "`estimate`, which needs no target"
        )
    double = prior.to(torch.float64)
    law = fitted_grid(double, lambda nodes: double.log_prob(nodes) + reward.to(nodes)(nodes) * inverse)
    return law.to(prior.means)


def log_normalizer(prior: Law, reward: Reward, alpha: Alpha) -> Float[Tensor, "*n"]:
    """`log E_prior[exp(reward/alpha)]`: a scalar, or (n,) with one mixture for each row. Raises as `tilt`."""
    if isinstance(prior, GaussianMixture) and isinstance(reward, QuadraticReward):
        return (prior.log_weights + whitened_tilt(prior, reward, alpha).log_normalizer).logsumexp(-1)
    return _tilted_grid(prior, reward, alpha).log_mass


def whitened_tilt(prior: GaussianMixture, reward: Reward, alpha: Alpha) -> WhitenedTilt:
    """The tilt of each component of `prior`, before they are put together. Raises as `tilt`."""
    scaled = require_quadratic(reward, prior.dim).to(prior.means) * (1 / require_alpha(alpha))
    root = prior.root
    added = root.mT @ scaled.Q @ root
    precision = torch.eye(prior.dim).to(root) + added
    cholesky = definite_cholesky(precision, 1 + added.diagonal(dim1=-2, dim2=-1).abs())
    if cholesky is None:
        raise ValueError(
            "the tilt does not exist: a component's precision + Q/alpha is not positive definite, "
            f"smallest whitened eigenvalue {torch.linalg.eigvalsh(precision).min().item():.3g}; "
            "raise alpha or use a reward that grows more slowly"
        )
    identity = torch.eye(prior.dim).to(root).expand_as(cholesky)
    factor = torch.linalg.solve_triangular(cholesky, identity, upper=False).mT
    slope = apply_each(factor.mT, apply_each(root.mT, scaled.gradient(prior.means)))
    log_mass = scaled(prior.means) + 0.5 * slope.square().sum(-1) - cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return WhitenedTilt(root, apply_each(factor, slope), factor, log_mass)


def require_alpha(alpha: Alpha) -> float:
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
