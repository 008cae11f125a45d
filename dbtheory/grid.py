"""Laws on a regular grid in one or two dimensions: what no small Gaussian mixture holds (MATH.md 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from dbtheory.schedule import NoiseSchedule, Time, as_time

MAX_NODES = 2**22  # 2048 x 2048
_REACH = 8  # nodes on each side over which a kernel of one spacing is summed: what it leaves out is e^-32
_SHARPENINGS = 3
_CHUNK_ENTRIES = 2**20


class GridLaw:
    """`sum_j weights[j] N(node_j, diag(spacing)^2)`: a mixture so dense that it follows any density.

    `log_density` holds the density that is meant, at the nodes. Kernels as wide as the spacing are smooth between
    nodes (a ripple of 5e-9, in scores 3e-8/spacing), but would smear the density; so the weights are the density
    sharpened by three rounds of Richardson and Lucy's positive deconvolution. A Gaussian of standard deviation 3
    spacings then keeps its variance to 1e-3, of 6 spacings to 5e-6; a jump stays smeared over a spacing.
    The mixture itself is the law: every method is exact for it, at every noise level.

    Raises ValueError for axes that are not one or two increasing, evenly spaced lines of at least 9 nodes, a
    density of another shape, and one that is NaN, infinite or zero everywhere.
    """

    def __init__(self, axes: Sequence[Tensor], log_density: Tensor) -> None:
        _require_grid(axes, log_density)
        log_density = log_density.detach().to(axes[0])
        self.axes: tuple[Tensor, ...] = tuple(axes)
        self.spacing: Float[Tensor, " d"] = torch.stack([(axis[-1] - axis[0]) / (len(axis) - 1) for axis in axes])
        self.log_mass: Float[Tensor, ""] = log_density.flatten().logsumexp(0) + self.spacing.log().sum()
        self.log_density: Tensor = log_density - self.log_mass
        self.log_weights: Tensor = _sharpened(log_density)

    @classmethod
    def from_density(
        cls,
        log_density: Callable[[Tensor], Tensor],
        low: Sequence[float | int],
        high: Sequence[float | int],
        counts: Sequence[int],
    ) -> GridLaw:
        """The law whose log density is `log_density` (m, d) -> (m,), up to a constant, on the box from `low` to
        `high` with `counts` nodes along each axis, in float64. `log_mass` keeps the log of its integral.

        Raises ValueError as the class, and for bounds and counts that make no grid of at most 2^22 nodes.
        """
        if not 1 <= len(low) == len(high) == len(counts) <= 2 or math.prod(counts) > MAX_NODES:
            raise ValueError(
                f"a grid needs low, high and counts for one or two axes, and at most {MAX_NODES} nodes, got "
                f"{list(low)}, {list(high)} and {list(counts)}; in more dimensions use a GaussianMixture"
            )
        bounds = zip(low, high, counts, strict=True)
        axes = [torch.linspace(float(a), float(b), n, dtype=torch.float64) for a, b, n in bounds]
        return cls(axes, log_density(_nodes(axes)).reshape(*counts))

    @property
    def dim(self) -> int:
        return len(self.axes)

    @cached_property
    def nodes(self) -> Float[Tensor, "m d"]:
        """All nodes, in the order of `log_weights.flatten()`."""
        return _nodes(self.axes)

    @property
    def mean(self) -> Float[Tensor, " d"]:
        return self._node_weights @ self.nodes

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        offsets = self.nodes - self.mean
        return (self._node_weights * offsets.mT) @ offsets + self.spacing.square().diag()

    @cached_property
    def discretisation_error(self) -> float:
        """Total variation between this law and the one on every second node, as densities at the nodes, plus
        the mass on the window's outermost nodes (a window that is too small shows there).

        It estimates the error by doubling, so it overstates it: on smooth densities the law at hand is many
        times closer to the truth than to the half as fine one.
        """
        difference = (self._density_at(self.axes) - self.coarser()._density_at(self.axes)).abs().sum()
        interior = self.log_weights[(slice(1, -1),) * self.dim].exp().sum()
        return float(0.5 * difference * self.spacing.prod() + (1 - interior))

    def log_prob(self, x: Tensor) -> Float[Tensor, " n"]:
        """Log density at the points `x` (n, d)."""
        return self._clean.log_prob(x)

    def score(self, x: Tensor) -> Float[Tensor, "n d"]:
        """`grad_x log p(x)` at the points `x` (n, d)."""
        return self._clean.score(x)

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """`n` independent draws: a node, and the kernel around it."""
        index = torch.multinomial(self._node_weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.dim, generator=generator, dtype=self.spacing.dtype, device=self.spacing.device)
        return self.nodes[index] + self.spacing * noise

    def noised(self, schedule: NoiseSchedule, t: Time) -> NoisedGrid:
        """The law of `x_t = alpha x_0 + sigma z`, exactly; `t` is a scalar, or (n,), one time a point.

        ValueError for times of another shape or outside [0, 1].
        """
        time = as_time(t)
        if time.ndim > 1:
            raise ValueError(f"t must be a scalar or (n,), got shape {tuple(time.shape)}")
        alpha, variance = schedule.alpha(time).to(self.spacing), schedule.variance(time).to(self.spacing)
        return NoisedGrid(self, alpha.reshape(-1, 1), variance.reshape(-1, 1))

    def to(self, *args, **kwargs) -> GridLaw:
        """The law on another dtype or device (arguments of `Tensor.to`)."""
        return GridLaw([axis.to(*args, **kwargs) for axis in self.axes], self.log_density + self.log_mass)

    def reweighted(self, log_factor: Tensor) -> GridLaw:
        """The law whose density is this one's times `exp(log_factor)`, given at `nodes` (m,), on the same grid."""
        return GridLaw(self.axes, self.log_density + log_factor.to(self.log_density).reshape(self.log_density.shape))

    def coarser(self) -> GridLaw:
        """The law of the same density on every second node."""
        return GridLaw([axis[::2] for axis in self.axes], self.log_density[(slice(None, None, 2),) * self.dim])

    def _density_at(self, axes: Sequence[Tensor]) -> Tensor:
        """The density on another grid: one matrix of kernels for each axis."""
        density = self.log_weights.exp()
        for i, (line, axis, spacing) in enumerate(zip(axes, self.axes, self.spacing, strict=True)):
            distances = (line.unsqueeze(-1) - axis) / spacing
            kernels = (-0.5 * distances.square()).exp() / (math.sqrt(2 * math.pi) * spacing)
            density = torch.tensordot(kernels, density.movedim(i, 0), dims=1).movedim(0, i)
        return density

    @cached_property
    def _node_weights(self) -> Float[Tensor, " m"]:
        return self.log_weights.flatten().exp()

    @cached_property
    def _clean(self) -> NoisedGrid:
        one = torch.ones(1, 1).to(self.spacing)
        return NoisedGrid(self, one, 0 * one)


class NoisedGrid:
    """`sum_j weights[j] N(alpha node_j, alpha^2 diag(spacing)^2 + variance I)`, from `GridLaw.noised`.

    Kernels are products over the axes, so that sums over all nodes are matrix products: on a plane
    `density(x) = e_1(x_1)' W e_2(x_2)`. A line is a plane whose second axis has one node.
    """

    def __init__(self, law: GridLaw, alpha: Tensor, variance: Tensor) -> None:
        """`alpha` and `variance` are (1, 1), or (n, 1): one time a point."""
        self.law, self.alpha = law, alpha
        self.variances = (alpha * law.spacing).square() + variance

    def log_prob(self, x: Tensor) -> Float[Tensor, " n"]:
        """Log density at the points `x` (n, d)."""
        return self.log_prob_and_score(x)[0]

    def score(self, x: Tensor) -> Float[Tensor, "n d"]:
        """`grad_x log p(x)` at the points `x` (n, d)."""
        return self.log_prob_and_score(x)[1]

    def log_prob_and_score(self, x: Tensor) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d"]]:
        """Both from the same sums; ValueError for points of another shape and for NaN."""
        law = self.law
        rows = len(self.alpha)
        if x.ndim != 2 or x.shape[1] != law.dim or (rows > 1 and len(x) != rows):
            raise ValueError(f"points must be ({rows if rows > 1 else 'n'}, {law.dim}), got shape {tuple(x.shape)}")
        if not bool(x.isfinite().all()):
            raise ValueError("points contain NaN or infinity; look for the step that made them")
        step = max(1, _CHUNK_ENTRIES // sum(map(len, law.axes)))
        every = [part.expand(len(x), -1).split(step) for part in (x.to(law.spacing), self.alpha, self.variances)]
        parts = [self._evaluate_chunk(*chunk) for chunk in zip(*every, strict=True)]
        log_prob, score = (torch.cat(part) for part in zip(*parts, strict=True))
        return log_prob - 0.5 * (2 * math.pi * self.variances).log().sum(-1), score

    def _evaluate_chunk(self, x: Tensor, alpha: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the sum over nodes of weight times `exp(-1/2 |x - alpha node|^2/variance)`, and its gradient."""
        offsets = [alpha * axis - x[:, i : i + 1] for i, axis in enumerate(self.law.axes)]
        exponents = [-0.5 * offset.square() / variances[:, i : i + 1] for i, offset in enumerate(offsets)]
        log_weights = self.law.log_weights
        if self.law.dim == 1:
            log_weights = log_weights.unsqueeze(-1)
            offsets, exponents = [*offsets, torch.zeros_like(x)], [*exponents, torch.zeros_like(x)]
        log_sum, pull = _sum_by_products(log_weights, offsets, exponents)
        # Points whose near nodes have next to no weight underflow there: their few sums are done in log space.
        lost = ~log_sum.isfinite()
        for i in lost.nonzero().flatten().tolist():
            near = [part[i] for part in offsets], [part[i] for part in exponents]
            log_sum[i], pull[i] = _sum_in_logs(log_weights, *near)
        return log_sum, pull[:, : self.law.dim] / variances


def _sum_by_products(
    log_weights: Tensor, offsets: Sequence[Tensor], exponents: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Log of the sum over a plane's nodes, and the mean offset (n, 2) under its terms; -inf where it underflows."""
    top = log_weights.max()
    weights = (log_weights - top).exp()
    peaks = [exponent.amax(-1) for exponent in exponents]
    first, second = [(e - peak.unsqueeze(-1)).exp() for e, peak in zip(exponents, peaks, strict=True)]
    terms = (first @ weights) * second
    total = terms.sum(-1)
    moments = [(((first * offsets[0]) @ weights) * second).sum(-1), (terms * offsets[1]).sum(-1)]
    # Well above the smallest number, so that the terms that matter keep all their digits.
    safe = total > torch.finfo(total.dtype).tiny * 1e10
    log_sum = torch.where(safe, total.log() + peaks[0] + peaks[1] + top, -math.inf)
    return log_sum, torch.stack(moments, -1) / total.where(safe, 1).unsqueeze(-1)


def _sum_in_logs(log_weights: Tensor, offsets: Sequence[Tensor], exponents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The same at one point, in log space."""
    joint = log_weights + exponents[0].unsqueeze(-1) + exponents[1]
    log_sum = joint.flatten().logsumexp(0)
    shares = (joint - log_sum).exp()
    return log_sum, torch.stack([shares.sum(1) @ offsets[0], shares.sum(0) @ offsets[1]])


def _sharpened(log_density: Tensor) -> Tensor:
    """Log weights, summing to 1, whose mixture has this density: `w <- w p / (kernel * w)`, repeated."""
    log_weights = log_density
    for _ in range(_SHARPENINGS):
        ratio = log_density - _smoothed(log_weights)
        log_weights = torch.where(log_density > -math.inf, log_weights + ratio, -math.inf)
    return log_weights - log_weights.flatten().logsumexp(0)


def _smoothed(log_weights: Tensor) -> Tensor:
    """Log of the convolution with a normal kernel of one spacing, along each axis in turn."""
    steps = torch.arange(-_REACH, _REACH + 1).to(log_weights)
    log_kernel = (-0.5 * steps.square()).log_softmax(0)
    for axis in range(log_weights.ndim):
        line = pad(log_weights.movedim(axis, -1), (_REACH, _REACH), value=-math.inf)
        log_weights = (line.unfold(-1, len(steps), 1) + log_kernel).logsumexp(-1).movedim(-1, axis)
    return log_weights


def _nodes(axes: Sequence[Tensor]) -> Tensor:
    return torch.cartesian_prod(*axes).reshape(-1, len(axes))


def _require_grid(axes: Sequence[Tensor], log_density: Tensor) -> None:
    if not 1 <= len(axes) <= 2 or any(axis.ndim != 1 or len(axis) < 9 for axis in axes):
        shapes = [tuple(axis.shape) for axis in axes]
        raise ValueError(f"a grid needs one or two axes of at least 9 nodes, got shapes {shapes}")
    for axis in axes:
        steps = axis.diff()
        rounding = 4 * torch.finfo(axis.dtype).eps * axis.abs().max() + 1e-6 * steps.mean()
        if not bool((steps > 0).all()) or bool((steps - steps.mean()).abs().max() > rounding):
            raise ValueError(f"an axis must increase in even steps, got steps from {steps.min()} to {steps.max()}")
    if log_density.shape != tuple(map(len, axes)):
        raise ValueError(f"one log density a node: need {tuple(map(len, axes))}, got {tuple(log_density.shape)}")
    if bool((log_density.isnan() | (log_density == math.inf)).any()) or not bool((log_density > -math.inf).any()):
        raise ValueError(
            "log densities must be numbers below infinity, and some above -infinity, got "
            f"{int(log_density.isnan().sum())} NaN and a maximum of {log_density.max().item()}; check the reward"
        )
