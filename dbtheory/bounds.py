"""Bounds of the Jensen gap `grad_x log E[e^R|x] - grad_x E[R|x]`, side by side (paper Lemma 2; MATH.md 5).

Throughout `R = reward/alpha`, expectations are under the prior's posterior `p(x_0 | x_t = x)`, `F = E[e^R]`, and
`y = (alpha_t/sigma_t^2)(x_0 - E[x_0|x])`, which is `grad_x log p(x_0|x)`. Every function takes points `x` (n, d) and
times `t` in (0, 1], a scalar or (n,). It raises ValueError as `jensen_gap`, and where `E[e^(2R) | x]` is infinite;
`HypothesisError`, a ValueError, where its bound does not apply.

- `covariance_bound`: no assumption, any dimension.
- `pathwise_lemma`: needs a differentiable coupling `x_0 = T_x(omega)` of the posteriors, no density of R.
- `density_lemma`: needs a density of R that vanishes at the ends of its support.
- `lemma_2_as_printed`: needs one dimension, where its sum of a vector and a number is defined.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.control import jensen_gap
from dbtheory.dispersion import Given
from dbtheory.law import Law
from dbtheory.mixture import apply_each
from dbtheory.reward import QuadraticReward, Reward
from dbtheory.reward_law import HypothesisError, RewardLaw, derivatives
from dbtheory.schedule import NoiseSchedule, Time
from dbtheory.tilt import Alpha, require_alpha, whitened_tilt


def covariance_bound(
    prior: Law, reward: Reward, alpha: Alpha, schedule: NoiseSchedule, x: Tensor, t: Time
) -> Float[Tensor, " n"]:
    """`(a/s^2) sqrt(Var(e^R/F - R)) sqrt(lambda_max Cov(x_0|x)) >= |gap|`: Cauchy-Schwarz on the gap's covariance."""
    return _covariance(Given.at(prior, reward, alpha, schedule, x, t))


def _covariance(given: Given) -> Tensor:
    widest = torch.linalg.eigvalsh(given.posterior.covariance)[..., -1]
    return given.ratio * widest.sqrt() * given.spread(1.0)


@dataclass(frozen=True)
class PathwiseLemma:
    """`gap = E[(e^R/F - 1) grad_x eta]`, `eta = R(T_x(omega)) - E[R|x]`, hence `|gap| <= L1 L2`.

    `L1 = sqrt(E|grad_x eta|^2)` depends on the coupling T; `L2 = sd(e^R)/F` does not.
    """

    gap: Float[Tensor, "n d"]
    identity: Float[Tensor, "n d"]
    L1: Float[Tensor, " n"]
    L2: Float[Tensor, " n"]

    @property
    def bound(self) -> Float[Tensor, " n"]:
        return self.L1 * self.L2


def pathwise_lemma(
    prior: Law, reward: Reward, alpha: Alpha, schedule: NoiseSchedule, x: Tensor, t: Time
) -> PathwiseLemma:
    """The lemma under the quantile coupling in 1-D, and for d > 1 under the affine one, `T_x = mean(x) + root omega`,
    which one Gaussian component has. HypothesisError for other laws, and rewards that are not quadratic, in d > 1.
    """
    return _pathwise(Given.at(prior, reward, alpha, schedule, x, t))


def _pathwise(given: Given) -> PathwiseLemma:
    if given.prior.dim == 1:
        return _quantile_coupling(given)
    if len(given.prior.means) > 1 or not isinstance(given.R, QuadraticReward):
        raise HypothesisError(
            f"in {given.prior.dim} dimensions the coupling is that of one Gaussian component with a quadratic reward, "
            f"got {len(given.prior.means)} components and a {type(given.reward).__name__}; use covariance_bound"
        )
    return _affine_coupling(given, given.R)


def _quantile_coupling(given: Given) -> PathwiseLemma:
    line, ratio = given.line, given.ratio.unsqueeze(-1)
    slope, _ = derivatives(given.R, given.posterior.mean + line.offsets)
    change = slope * line.quantile_slope(ratio)  # d/dx R(T_x(omega)), whose mean is d/dx E[R|x]
    change = change - line.mean(change).unsqueeze(-1)
    y = ratio * line.offsets
    gap = line.tilt_mean(y) - line.mean(line.log_ratio * y)
    identity = line.tilt_mean(change)
    L1 = line.mean(change.square()).sqrt()
    return PathwiseLemma(gap.unsqueeze(-1), identity.unsqueeze(-1), L1, line.spread(0.0))


def _affine_coupling(given: Given, R: QuadraticReward) -> PathwiseLemma:
    """`grad_x eta = -J Q (x_0 - mean)` with `J = d mean/dx = (a/s^2) Cov(x_0|x)`."""
    posterior = given.posterior
    curvature = given.ratio.reshape(-1, 1, 1) * posterior.covariance @ R.Q
    shift = apply_each(posterior.root, whitened_tilt(posterior, R, 1).shift)  # of the mean, by the tilt
    identity = -(curvature @ shift.mT).squeeze(-1)
    L1 = (curvature @ posterior.root.squeeze(-3)).flatten(1).norm(dim=-1)
    return PathwiseLemma(_gap(given), identity, L1, given.spread(0.0))


def _gap(given: Given) -> Tensor:
    return jensen_gap(given.prior, given.reward, given.alpha, given.schedule, given.x, given.t)


@dataclass(frozen=True)
class DensityLemma:
    """`gap = E[(e^R/F - c R) D]` for every c, `D = grad_x log p_R(r|x) + d_r log p_R(r|x) grad_x E[R|x]`.

    Because `E[D] = E[R D] = 0`. Hence `|gap| <= sqrt(Var(e^R/F - c R)) sqrt(E|D|^2)`: here at c = 0, where the first
    factor is the paper's L2, at c = 1, and at the c that makes it least, the regression coefficient of e^R/F on R.
    """

    gap: Float[Tensor, "n d"]
    identity: Float[Tensor, "n d"]  # E[(e^R/F) D]
    mean_D: Float[Tensor, "n d"]
    mean_RD: Float[Tensor, "n d"]
    size_D: Float[Tensor, " n"]  # sqrt(E|D|^2)
    L2: Float[Tensor, " n"]
    unit_spread: Float[Tensor, " n"]  # sd(e^R/F - R)
    best_spread: Float[Tensor, " n"]  # sd(e^R/F - best_c R)
    best_c: Float[Tensor, " n"]

    @property
    def bound(self) -> Float[Tensor, " n"]:
        """c = 0."""
        return self.L2 * self.size_D

    @property
    def unit_bound(self) -> Float[Tensor, " n"]:
        """c = 1."""
        return self.unit_spread * self.size_D

    @property
    def best_bound(self) -> Float[Tensor, " n"]:
        """The least over c."""
        return self.best_spread * self.size_D


def density_lemma(
    prior: Law, reward: Reward, alpha: Alpha, schedule: NoiseSchedule, x: Tensor, t: Time
) -> DensityLemma:
    """The lemma for linear rewards in any dimension, and in 1-D for strictly monotone ones under which p_R, r p_R and
    e^r p_R vanish at both ends of R's support; HypothesisError for any other."""
    return _density(Given.at(prior, reward, alpha, schedule, x, t))


def _density(given: Given) -> DensityLemma:
    law = RewardLaw.of(given)
    line, mean = law.line, law.line.mean
    excess = line.excess
    jensen = mean(excess.unsqueeze(-1) * law.score_x)  # grad_x E[R|x] = Cov(R, grad_x log p_R)
    D = law.score_x + law.score_r.unsqueeze(-1) * jensen.unsqueeze(-2)
    best_c = line.tilt_mean(excess) / mean(excess.square())
    return DensityLemma(
        gap=line.tilt_mean(law.score_x) - jensen,
        identity=line.tilt_mean(D) + mean(D),
        mean_D=mean(D),
        mean_RD=mean(excess.unsqueeze(-1) * D),
        size_D=mean(D.square().sum(-1)).sqrt(),
        L2=line.spread(0.0),
        unit_spread=line.spread(1.0),
        best_spread=line.spread(best_c.unsqueeze(-1)),
        best_c=best_c,
    )


@dataclass(frozen=True)
class PrintedLemma2:
    """The paper's `|gap| <= L1 L2 + L3`. L1 L2 alone bounds the gap: it is the pathwise lemma's."""

    L1: Float[Tensor, " n"]
    L2: Float[Tensor, " n"]
    L3: Float[Tensor, " n"]

    @property
    def bound(self) -> Float[Tensor, " n"]:
        return self.L1 * self.L2 + self.L3


def lemma_2_as_printed(
    prior: Law,
    reward: Reward,
    alpha: Alpha,
    schedule: NoiseSchedule,
    x: Tensor,
    t: Time,
    *,
    deviations: float = 3.0,
) -> PrintedLemma2:
    """Paper Lemma 2, with the supremum in `L3 = (1 + 1/alpha) sup_r |d_x log p_R(r|x) + d_r log p_R(r|x)|` over the r
    within `deviations` standard deviations of `E[R|x]`: over all r it is infinite even for a Gaussian R.

    L1 is that of the quantile coupling; the paper names none. The supremum is over a lattice of 16 nodes or more a
    standard deviation, down to where p_R and its tilts are e^-100 of their largest. HypothesisError in d > 1, and as
    `density_lemma`; ValueError for deviations that are not positive.
    """
    if not deviations > 0:
        raise ValueError(f"the supremum needs a range of positive width, got {deviations} standard deviations")
    return _printed(Given.at(prior, reward, alpha, schedule, x, t), deviations)


def _printed(given: Given, deviations: float = 3.0) -> PrintedLemma2:
    if given.prior.dim != 1:
        raise HypothesisError(
            f"the printed L3 adds grad_x log p_R, a vector of {given.prior.dim}, to d_r log p_R, a number: it is "
            "defined in one dimension only; use density_lemma or covariance_bound"
        )
    law, path = RewardLaw.of(given), _quantile_coupling(given)
    distance = law.line.excess.abs()
    reach = deviations * law.line.mean(distance.square()).sqrt().unsqueeze(-1)
    largest = _largest_within(law.score_x.squeeze(-1) + law.score_r, distance, reach)
    return PrintedLemma2(path.L1, path.L2, (1 + 1 / require_alpha(given.alpha)) * largest)


def _largest_within(values: Tensor, distance: Tensor, reach: Tensor) -> Tensor:
    """The largest |value| (n, m) -> (n,) at the nodes with distance <= reach and, interpolated, where they end."""
    inside = distance <= reach
    start, end = distance[:, :-1], distance[:, 1:]
    crossing = inside[:, :-1] != inside[:, 1:]
    share = torch.where(crossing, (reach - start) / (end - start), 0.0)
    at_ends = torch.lerp(values[:, :-1], values[:, 1:], share).abs()
    return torch.maximum(values.abs().where(inside, 0.0).amax(-1), at_ends.where(crossing, 0.0).amax(-1))


def all_bounds(
    prior: Law, reward: Reward, alpha: Alpha, schedule: NoiseSchedule, x: Tensor, t: Time
) -> dict[str, Float[Tensor, " n"]]:
    """Every bound that applies, by name; "Lemma 2, 3 sd" is the printed one over three standard deviations of R."""
    return _all_bounds(Given.at(prior, reward, alpha, schedule, x, t))


def _all_bounds(given: Given) -> dict[str, Tensor]:
    found = {"covariance": _covariance(given)}
    with suppress(HypothesisError):
        found["pathwise"] = _pathwise(given).bound
    with suppress(HypothesisError):
        density = _density(given)
        found |= {"density, c = 0": density.bound, "density, c = 1": density.unit_bound}
        found["density, best c"] = density.best_bound
    with suppress(HypothesisError):
        found["Lemma 2, 3 sd"] = _printed(given).bound
    return found


def tightness(
    prior: Law, reward: Reward, alpha: Alpha, schedule: NoiseSchedule, x: Tensor, t: Time
) -> dict[str, Float[Tensor, " n"]]:
    """`bound/|gap|` for every bound of `all_bounds`, side by side: 1 is tight, below 1 would be a violation."""
    gap = jensen_gap(prior, reward, alpha, schedule, x, t).norm(dim=-1)
    return {name: bound / gap for name, bound in all_bounds(prior, reward, alpha, schedule, x, t).items()}
