"""Gaussian mixtures: the priors, targets and posteriors for which everything is known exactly (MATH.md 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property, reduce
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.schedule import NoiseSchedule, Time, as_time

# Points are handled in pieces of about this many (point, component, coordinate) entries: a piece stays in
# cache, and 1e6 points x 64 components need megabytes, not gigabytes.
_CHUNK_ENTRIES = 2**18
# glibc's malloc gives freed blocks back to the system, and having them zeroed for the next piece takes longer than the
# arithmetic. Once it has seen a larger block freed, it keeps them: this is that block, and it is never touched.
torch.empty(2**24, dtype=torch.uint8, device="cpu")


class GaussianMixture:
    """`sum_k weights[k] N(means[k], covariances[k])`, or one such mixture for each of n rows.

    Shapes: weights (K,), means (K, d), covariances (K, d, d). A mixture for each of n rows (from `posterior`,
    or from `noised` with n times) has weights (n, K), means (n, K, d), covariances (n, K, d, d), and its
    `log_prob` and `score` take one point for each row. Covariances are kept as eigenvalues (..., K, d) and
    eigenvectors (K, d, d), which noising and conditioning share: no (n, K, d, d) tensor is made unless
    `covariances` is asked for. The dtype is the widest of the three given.

    Raises ValueError for shapes that disagree, values that are not finite, weights that are negative or do
    not sum to 1 (tolerance 1e-6, then renormalised), covariances that are not symmetric positive definite.
    """

    log_weights: Tensor
    means: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        _require_shapes(weights, means, covariances)
        dtype = reduce(torch.promote_types, (weights.dtype, means.dtype, covariances.dtype))
        weights, means, covariances = (part.to(means.device, dtype) for part in (weights, means, covariances))
        _require_simplex(weights)
        self.log_weights = (weights / weights.sum()).log()
        self.means = means
        self.eigenvalues, self.eigenvectors = _decompose(covariances)

    @classmethod
    def from_eigen(
        cls, log_weights: Tensor, means: Tensor, eigenvalues: Tensor, eigenvectors: Tensor
    ) -> GaussianMixture:
        """A mixture from its parts, unchecked: log_weights (..., K) up to a constant, means (..., K, d),
        eigenvalues (..., K, d) and eigenvectors (..., K, d, d) (as columns) of the covariances."""
        mixture = cls.__new__(cls)
        mixture.log_weights = log_weights.log_softmax(-1)
        mixture.means = means
        mixture.eigenvalues = eigenvalues
        mixture.eigenvectors = eigenvectors
        return mixture

    @property
    def dim(self) -> int:
        return self.means.shape[-1]

    @property
    def is_batched(self) -> bool:
        """Whether there is one mixture for each of n rows."""
        return self.means.ndim == 3

    @property
    def weights(self) -> Float[Tensor, "*n K"]:
        return self.log_weights.exp()

    @property
    def root(self) -> Float[Tensor, "*n K d d"]:
        """`root root' = covariance`; without the axis of rows where they share it."""
        return self.eigenvectors * self.eigenvalues.sqrt().unsqueeze(-2)

    @property
    def covariances(self) -> Float[Tensor, "*n K d d"]:
        return (self.root @ self.root.mT).expand(*self.means.shape, self.dim)

    @property
    def mean(self) -> Float[Tensor, "*n d"]:
        return (self.weights.unsqueeze(-1) * self.means).sum(-2)

    @property
    def covariance(self) -> Float[Tensor, "*n d d"]:
        """Within plus between the components."""
        offsets = self.means - self.mean.unsqueeze(-2)
        between = offsets.unsqueeze(-1) * offsets.unsqueeze(-2)
        return (self.weights[..., None, None] * (self.covariances + between)).sum(-3)

    def to(self, *args, **kwargs) -> GaussianMixture:
        """The mixture on another dtype or device (arguments of `Tensor.to`)."""
        parts = (self.log_weights, self.means, self.eigenvalues, self.eigenvectors)
        return GaussianMixture.from_eigen(*(part.to(*args, **kwargs) for part in parts))

    def log_prob(self, x: Tensor) -> Float[Tensor, " n"]:
        """Log density at the points `x` (n, d)."""
        return self._in_chunks(lambda part, points: part.joint_log_prob(points).logsumexp(-1), x)

    def score(self, x: Tensor) -> Float[Tensor, "n d"]:
        """`grad_x log p(x)` at the points `x` (n, d)."""
        return self._in_chunks(GaussianMixture._score, x)

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """`n` independent draws; ValueError where there is one mixture for each row."""
        if self.is_batched:
            raise ValueError("sample needs a single mixture, got one for each row; sample a row's own mixture")
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.dim, generator=generator, dtype=self.means.dtype, device=self.means.device)
        whitened = self.eigenvalues.expand_as(self.means)[k].sqrt() * noise
        return self.means[k] + apply_each(self.eigenvectors[k], whitened)

    def noised(self, schedule: NoiseSchedule, t: Time) -> GaussianMixture:
        """The law of `x_t = alpha x_0 + sigma z`; with times (n,), one mixture for each of n rows."""
        self._require_single("noised")
        alpha, variance = self._scales(schedule, t)
        means = alpha * self.means
        return GaussianMixture.from_eigen(
            self.log_weights.expand(means.shape[:-1]),
            means,
            alpha**2 * self.eigenvalues + variance,
            self.eigenvectors,
        )

    def posterior(self, schedule: NoiseSchedule, x: Tensor, t: Time) -> GaussianMixture:
        """The law of `x_0` given `x_t = x`, (n, d): one mixture for each row; `t > 0` is a scalar or (n,).

        ValueError at a time with no noise, where the posterior is a point.
        """
        self._require_single("posterior")
        alpha, variance = self._scales(schedule, t)
        if bool((variance <= 0).any()):
            raise ValueError(f"the posterior at a time without noise is a point, got t = {t}; use t > 0")
        noised = self.noised(schedule, t)
        x = noised.require_points(x)
        gain = alpha * self.eigenvalues / noised.eigenvalues
        moved = apply_each(self.eigenvectors, gain * noised.whiten(x, power=0))
        return GaussianMixture.from_eigen(
            noised.joint_log_prob(x),
            self.means + moved,
            self.eigenvalues * variance / noised.eigenvalues,
            self.eigenvectors,
        )

    def joint_log_prob(self, x: Tensor) -> Float[Tensor, "n K"]:
        """Log of weight times density of each component at the points `x` (n, d)."""
        x = self.require_points(x)
        return self._joint_log_prob(self.whiten(x))

    def component_scores(self, x: Tensor) -> Float[Tensor, "n K d"]:
        """The score of each component at the points `x` (n, d)."""
        return -apply_each(self.eigenvectors, self.whiten(self.require_points(x), power=-1))

    def whiten(self, x: Tensor, power: float | int = -0.5) -> Float[Tensor, "n K d"]:
        """`x - means` in each component's eigenbasis, times `eigenvalues ** power` (-1/2: unit variance)."""
        # Subtract first: in the other order digits cancel where a narrow component lies far from the origin.
        if self.is_batched:
            return apply_each(self.eigenvectors.mT, x.unsqueeze(-2) - self.means) * self.eigenvalues**power
        # In memory the points run fastest, here and in all that is made from this elementwise: rows are long.
        offsets = x.mT.contiguous() - self.means.unsqueeze(-1)
        return (self._scaled_eigenvectors(power).mT @ offsets).permute(2, 0, 1)

    def require_points(self, x: Tensor) -> Tensor:
        """`x` in the mixture's dtype; ValueError unless (n, d) with the mixture's d (and n), without NaN."""
        if x.ndim != 2 or x.shape[1] != self.dim or (self.is_batched and len(x) != len(self.means)):
            rows = str(len(self.means)) if self.is_batched else "n"
            raise ValueError(f"points must be ({rows}, {self.dim}), got shape {tuple(x.shape)}")
        if not bool(x.isfinite().all()):
            raise ValueError("points contain NaN or infinity; look for the step that made them")
        return x.to(self.means)

    def _score(self, x: Tensor) -> Tensor:
        whitened = self.whiten(x)
        # In bits, because torch's exp takes three times as long as its exp2; normalised at the very end.
        bits = self._joint_log_prob(whitened, unit=math.log(2))
        shares = (bits - bits.amax(-1, keepdim=True)).exp2()
        pull = whitened * shares.unsqueeze(-1)
        return -self._sum_back(pull) / shares.sum(-1, keepdim=True)

    def _sum_back(self, whitened: Tensor) -> Tensor:
        """`sum_k eigenvectors eigenvalues^(-1/2) whitened`, (n, K, d) -> (n, d)."""
        if self.is_batched:
            return apply_each(self.eigenvectors, whitened * self.eigenvalues**-0.5).sum(-2)
        matrix = self._scaled_eigenvectors(-0.5).transpose(0, 1).flatten(1)  # (d, K d)
        return (matrix @ whitened.permute(1, 2, 0).flatten(0, 1)).mT

    def _scaled_eigenvectors(self, power: float | int) -> Tensor:
        return self.eigenvectors * self.eigenvalues.unsqueeze(-2) ** power

    @cached_property
    def _log_peaks(self) -> Tensor:
        """Log of weight times density of each component at its own mean, (..., K)."""
        log_scale = 0.5 * self.eigenvalues.log().sum(-1) + 0.5 * self.dim * math.log(2 * math.pi)
        return self.log_weights - log_scale

    def _joint_log_prob(self, whitened: Tensor, unit: float = 1.0) -> Tensor:
        """(n, K), counted in `unit`s: 1 for nats, ln 2 for bits."""
        log_joint = self._log_peaks / unit
        # One coordinate at a time: torch's sum over them would not keep the order in memory.
        for coordinate in whitened.unbind(-1):
            log_joint = torch.addcmul(log_joint, coordinate, coordinate, value=-0.5 / unit)
        return log_joint

    def _scales(self, schedule: NoiseSchedule, t: Time) -> tuple[Tensor, Tensor]:
        """alpha and sigma^2 as () or (n, 1, 1), to stand beside (K, d)."""
        time = as_time(t)
        if time.ndim > 1:
            raise ValueError(f"t must be a scalar or (n,), got shape {tuple(time.shape)}")
        shape = (-1, 1, 1) if time.ndim else ()
        return (
            schedule.alpha(time).to(self.means).reshape(shape),
            schedule.variance(time).to(self.means).reshape(shape),
        )

    def _require_single(self, what: str) -> None:
        if self.is_batched:
            raise ValueError(f"{what} needs a single mixture, got one for each row")

    def _in_chunks(self, function: Callable[[GaussianMixture, Tensor], Tensor], x: Tensor) -> Tensor:
        x = self.require_points(x)
        rows = max(1, _CHUNK_ENTRIES // self.means.shape[-2:].numel())
        if len(x) <= rows:
            return function(self, x)
        starts = range(0, len(x), rows)
        return _gather((function(self._rows(i, i + rows), x[i : i + rows]) for i in starts), len(x))

    def _rows(self, start: int, stop: int) -> GaussianMixture:
        """The mixtures of some rows, or the one mixture that serves every row."""
        if not self.is_batched:
            return self
        parts = ((self.log_weights, 2), (self.means, 3), (self.eigenvalues, 3), (self.eigenvectors, 4))
        return GaussianMixture.from_eigen(
            *(part[start:stop] if part.ndim == batched and len(part) > 1 else part for part, batched in parts)
        )


def apply_each(matrices: Tensor, vectors: Tensor) -> Tensor:
    """One matrix (..., K, d, d) for each vector (..., K, d); matrices (K, d, d) serve every row uncopied."""
    if matrices.ndim == 3 and vectors.ndim == 3:
        return torch.einsum("kij,nkj->nki", matrices, vectors)
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)


def _gather(pieces: Iterator[Tensor], count: int) -> Tensor:
    """The pieces as one tensor of `count` rows, copied as they come: waiting, they would fragment the memory."""
    first = next(pieces)
    if first.requires_grad:
        return torch.cat([first, *pieces])
    result, done = first.new_empty(count, *first.shape[1:]), 0
    for piece in chain([first], pieces):
        result[done : done + len(piece)] = piece
        done += len(piece)
    return result


def _decompose(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (K, d) and eigenvectors (K, d, d); ValueError unless symmetric positive definite."""
    scale = covariances.abs().amax((-2, -1), keepdim=True)
    if bool(((covariances - covariances.mT).abs() > 1e-6 * scale).any()):
        raise ValueError("covariances must be symmetric; use (C + C.mT) / 2")
    eigenvalues, eigenvectors = torch.linalg.eigh(0.5 * (covariances + covariances.mT))
    rounding = torch.finfo(eigenvalues.dtype).eps * eigenvalues.abs().amax(-1)
    bad = (eigenvalues.amin(-1) <= rounding).nonzero().flatten().tolist()
    if bad:
        lowest = eigenvalues[bad[0]].min().item()
        raise ValueError(
            f"covariances must be positive definite: component {bad[0]} has smallest eigenvalue {lowest:.3g}"
            "; add a small multiple of the identity"
        )
    return eigenvalues, eigenvectors


def _require_shapes(weights: Tensor, means: Tensor, covariances: Tensor) -> None:
    if means.ndim != 2 or weights.shape != means.shape[:1] or covariances.shape != (*means.shape, means.shape[1]):
        shapes = ", ".join(str(tuple(part.shape)) for part in (weights, means, covariances))
        raise ValueError(f"weights, means, covariances must be (K,), (K, d), (K, d, d), got {shapes}")
    if means.numel() == 0 or not means.is_floating_point():
        raise ValueError(f"means must be floating and not empty, got {means.dtype} of shape {tuple(means.shape)}")
    if not all(bool(part.isfinite().all()) for part in (weights, means, covariances)):
        raise ValueError("weights, means and covariances must be finite, got NaN or infinity")


def _require_simplex(weights: Tensor) -> None:
    total = weights.sum(dtype=torch.float64).item()
    if bool((weights < 0).any()) or abs(total - 1) > 1e-6:
        raise ValueError(f"weights must be >= 0 and sum to 1, got {weights.tolist()} with sum {total:.9g}; normalise")
