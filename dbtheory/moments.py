"""Exact means and covariances of generation from Gaussian experts: nothing is drawn (MATH.md 6).

The score of a Gaussian is affine, hence so is the sampler's step with each expert, and the first two moments of the
chain obey closed recursions, both for the mean of the experts and where one of them is drawn at each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.assignment import changing_rotation_choice
from dbtheory.blend import Blender, MeanBlend, SampledBlend, Step
from dbtheory.experts import ExactExperts
from dbtheory.law import Law
from dbtheory.mixture import GaussianMixture
from dbtheory.schedule import NoiseSchedule
from dbtheory.steps import advance


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of each of P laws."""

    mean: Float[Tensor, "P d"]
    covariance: Float[Tensor, "P d d"]

    def mixed(self, weights: Float[Tensor, " P"]) -> Moments:
        """Of the one mixture of these laws: the mean of the covariances plus the covariance of the means."""
        mean = weights @ self.mean
        offsets = self.mean - mean
        covariance = self.covariance + offsets.unsqueeze(-1) * offsets.unsqueeze(-2)
        return Moments(mean.unsqueeze(0), torch.einsum("p,pij->ij", weights, covariance).unsqueeze(0))


@dataclass(frozen=True, eq=False)
class AffineStep:
    """The sampler's step with each of m experts: `x -> matrices[i] x + shifts[i] + sqrt(variance) z`."""

    matrices: Float[Tensor, "m d d"]
    shifts: Float[Tensor, "m d"]
    variance: Float[Tensor, ""]

    def __call__(self, law: Moments) -> Moments:
        """The moments after it: of m laws, of expert i after law i, or of all experts after one law."""
        mean = (self.matrices @ law.mean.unsqueeze(-1)).squeeze(-1) + self.shifts
        noise = self.variance * torch.eye(mean.shape[-1]).to(mean)
        return Moments(mean, self.matrices @ law.covariance @ self.matrices.mT + noise)

    def averaged(self, weights: Float[Tensor, " m"]) -> AffineStep:
        """The step with the weighted mean of the experts, for weights that sum to 1."""
        matrices, shifts = torch.einsum("m,mij->ij", weights, self.matrices), weights @ self.shifts
        return AffineStep(matrices.unsqueeze(0), shifts.unsqueeze(0), self.variance)

    def of(self, experts: Tensor) -> AffineStep:
        """The step with these experts, indices (P,)."""
        return AffineStep(self.matrices[experts], self.shifts[experts], self.variance)


def affine_step(experts: ExactExperts, t: Tensor, t_next: Tensor, method: str = "ddpm") -> AffineStep:
    """The sampler's step from t to t_next (0 = data, 1 = noise) with each of `experts.names`.

    Raises:
        ValueError: an expert that is no single Gaussian, or a method other than "ddpm" and "euler".
    """
    of_x, of_score, of_noise = _linear_response(experts.schedule, t, t_next, method)
    gains, pulls = _affine_scores(experts, t)
    identity = torch.eye(gains.shape[-1]).to(gains)
    return AffineStep(of_x * identity + of_score * gains, of_score * pulls, of_noise**2)


def chain_moments(
    blender: Blender, experts: ExactExperts, grid: Float[Tensor, " times"], *, method: str = "ddpm"
) -> Moments:
    """Of one of the samples that `sample(experts, blender, ..., grid=grid, method=method)` returns, exactly: P = 1.

    `MeanBlend` is one affine chain. `SampledBlend` in the order "iid" draws the expert independently of x, so every
    step is a mixture, and the law of total covariance closes the recursion. In the order "low-discrepancy", with
    two experts, the chain is affine given the phase U, and the order of the experts changes at no more than one U a
    step: the law of total covariance over these pieces of [0, 1) is exact.

    Raises:
        ValueError: as `affine_step`; another blender, weights that differ between samples, negative ones of a
            `SampledBlend`, or the low-discrepancy order of more than two experts, where phases are hashed.
    """
    steps = [affine_step(experts, t, t_next, method) for t, t_next in pairwise(grid)]
    weights = _weights(blender, experts, len(steps))
    variance, d = experts.schedule.variance(grid[0]), len(steps[0].shifts[0])
    law = Moments(torch.zeros(1, d).to(variance), variance * torch.eye(d).to(variance).unsqueeze(0))
    if not isinstance(blender, SampledBlend):
        for step, w in zip(steps, weights, strict=True):
            law = step.averaged(w)(law)
        return law
    if bool((weights < 0).any()):
        raise ValueError(f"draws need probabilities, the lowest weight is {weights.min():.6g}; use MeanBlend")
    if blender.order == "low-discrepancy":
        return _rotation_chain(law, steps, weights)
    for step, w in zip(steps, weights, strict=True):
        law = step(law).mixed(w)
    return law


def _rotation_chain(law: Moments, steps: list[AffineStep], weights: Tensor) -> Moments:
    active = weights.any(0).nonzero().flatten()
    if len(active) > 2:
        raise ValueError(f"the low-discrepancy order has closed moments for two experts, got {len(active)}; use iid")
    # floor(W_k + U) jumps where U = -W_k mod 1; between these the order of the experts does not change
    jumps = (-weights[:, active[0]].cumsum(0)) % 1.0
    ends = torch.cat([jumps.new_zeros(1), jumps.sort().values, jumps.new_ones(1)])
    phase = 0.5 * (ends[1:] + ends[:-1])
    for k, step in enumerate(steps):
        choice = changing_rotation_choice(weights[: k + 1, None, active], phase)
        law = step.of(active[choice])(law)
    return law.mixed(ends.diff())


def _weights(blender: Blender, experts: ExactExperts, count: int) -> Float[Tensor, "steps m"]:
    """The coefficients of `experts.names` at every step."""
    if not isinstance(blender, MeanBlend | SampledBlend):
        raise ValueError(f"closed moments exist for MeanBlend and SampledBlend, got {type(blender).__name__}")
    blender.preference.validate(experts.names)
    if blender.preference.rows is not None:
        raise ValueError("the moments are of one sample: weights must not differ between samples")
    phase = torch.zeros(1, dtype=torch.float64)
    steps = [Step(k, count, 1.0, 0.0, phase) for k in range(count)]
    laws = [blender.preference.coefficients(step.progress) for step in steps]
    return torch.tensor([[law[name] for name in experts.names] for law in laws], dtype=torch.float64)


def _affine_scores(experts: ExactExperts, t: Tensor) -> tuple[Tensor, Tensor]:
    """`score_i(x) = gains[i] x + pulls[i]` of every expert."""
    targets = [_gaussian(name, experts.targets[name]) for name in experts.names]
    alpha, variance = experts.schedule.alpha(t), experts.schedule.variance(t)
    covariances = torch.stack([target.covariances[0] for target in targets])
    gains = -torch.linalg.inv(alpha**2 * covariances + variance * torch.eye(covariances.shape[-1]).to(covariances))
    means = alpha * torch.stack([target.means[0] for target in targets])
    return gains, -(gains @ means.unsqueeze(-1)).squeeze(-1)


def _gaussian(name: str, target: Law) -> GaussianMixture:
    if not isinstance(target, GaussianMixture) or len(target.means) != 1:
        raise ValueError(f'closed moments need Gaussian experts, "{name}" is none; use particles or Fokker-Planck')
    return target


def _linear_response(schedule: NoiseSchedule, t: Tensor, t_next: Tensor, method: str) -> list[Tensor]:
    """The factors of x, score and noise in the sampler's own step, which is linear in the three."""
    if method not in ("ddpm", "euler"):
        raise ValueError(f'closed moments exist for the methods "ddpm" and "euler", got {method!r}')
    x, score, noise = torch.eye(3, dtype=torch.float64)
    return list(advance(method, x, score, t, t_next, noise, schedule, source="score"))
