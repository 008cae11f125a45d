"""MSDDA: Gaussian steps fused by their precisions (MATH.md 7).

If expert i's step is N(mu_i, S_i), the best step for the preference's coefficients c is N(mu, S) with

    S^-1 = sum_i c_i S_i^-1,    S^-1 mu = sum_i c_i S_i^-1 mu_i,

which is `prod_i N(mu_i, S_i)^c_i` normalised. It is the best for that step alone: what it is normalised by,
`exp(log_normalizer)`, depends on where the step starts, and a chain of such steps forgets it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.blend import Step, active_names
from dbtheory.definite import definite_cholesky
from dbtheory.experts import Experts, Points
from dbtheory.preference import BASE, Preference
from dbtheory.schedule import Time

# The covariances (n, d, d) of every expert's step from x (n, d), at t, down to t_next.
Kernels = Callable[[Tensor, Time, Time], Mapping[str, Tensor]]


@dataclass(frozen=True)
class PrecisionBlend:
    """MSDDA's step, for any number of experts and the base.

    `variances` maps "base" and every expert of the preference to `s_i^2` (a number, for an isotropic step) or `S_i`
    (d, d), in units of the sampler's own step variance. If all are numbers this is DB-MPA with coefficients
    `rho_i = c_i / (s_i^2 L)`, `L = sum_i c_i / s_i^2`, and step variance 1/L; if they are equal, DB-MPA itself.
    Or `variances` is a function `(x, t, t_next)` that returns the covariances `S_i` (n, d, d) themselves, such as
    `dbtheory.kernels.exact_kernels`, for method "ddpm".

    Raises:
        ValueError: a variance that is missing, unknown, not finite or not positive (definite); a blended precision
            that is not positive definite, so that no such step exists (at a call, where it depends on the step).
    """

    preference: Preference
    variances: Mapping[str, Tensor | float | int] | Kernels

    def __post_init__(self) -> None:
        if isinstance(self.variances, Mapping):
            fuse(self._coefficients(progress=0.0), _stacked(self.variances, self._names))

    def __call__(self, experts: Experts, x: Points, t: Tensor | float, step: Step) -> Points:
        """`sum_i c_i S S_i^-1 prediction_i`: these matrices sum to I, so it is mu in every parametrisation."""
        self.preference.validate(experts.names)
        self.preference.require_rows(len(x), step.progress)
        active = active_names(experts, self.preference.coefficients(step.progress))
        predictions = experts.predict(x, t, active)
        if len(active) == 1:
            return predictions[0]
        shares, _ = self._fused(x, step)
        parts = [_apply(shares[self._names.index(name)], p) for name, p in zip(active, predictions, strict=True)]
        return torch.stack(parts).sum(0)

    def require_method(self, method: str) -> None:
        """ValueError for a function `variances` and a method other than "ddpm"."""
        if callable(self.variances) and method != "ddpm":
            raise ValueError(f'covariances of x_s given x_t belong to method="ddpm", received {method!r}')

    def noise(self, z: Points, own_variance: Tensor | float, x: Points, step: Step) -> Points:
        """The noise of the step from `x`, by standard normal `z`: covariance S, in units of `own_variance` unless
        `variances` is a function."""
        _, root = self._fused(x, step)
        return _apply(root, z) * (1.0 if callable(self.variances) else own_variance**0.5)

    @property
    def _names(self) -> tuple[str, ...]:
        return BASE, *self.preference.names

    def _coefficients(self, progress: float) -> Float[Tensor, "m k"]:
        c = self.preference.coefficients(progress)
        columns = [torch.as_tensor(c[name], dtype=torch.float64).reshape(-1) for name in self._names]
        return torch.stack(torch.broadcast_tensors(*columns))

    def _fused(self, x: Points, step: Step) -> tuple[Float[Tensor, "m k q q"], Float[Tensor, "k q q"]]:
        variances = self.variances(x, step.t, step.t_next) if callable(self.variances) else self.variances
        return fuse(self._coefficients(step.progress), _stacked(variances, self._names))


def fuse(
    coefficients: Float[Tensor, "m k"], covariances: Float[Tensor, "m j q q"]
) -> tuple[Float[Tensor, "m n q q"], Float[Tensor, "n q q"]]:
    """Each kernel's share `c_i S S_i^-1` of the fused mean, which sum to I, and a root of `S = root root'`.

    One of k and j may be 1; n is the larger. ValueError unless `S^-1 = sum_i c_i S_i^-1` is positive definite.
    """
    pulls = coefficients[..., None, None].to(covariances) * torch.linalg.inv(covariances)
    precision = pulls.sum(0)
    cholesky = definite_cholesky(precision, pulls.abs().sum(0).diagonal(dim1=-2, dim2=-1))
    if cholesky is None:
        raise ValueError(
            "the blended precision sum_i c_i S_i^-1 is not positive definite, smallest eigenvalue "
            f"{float(torch.linalg.eigvalsh(precision).min()):.6g}: no such Gaussian step exists; lower kl_scale"
        )
    return torch.cholesky_solve(pulls, cholesky), torch.linalg.inv(cholesky).mT


def log_normalizer(
    coefficients: Float[Tensor, " m"], means: Float[Tensor, "m n d"], covariances: Float[Tensor, "m j d d"]
) -> Float[Tensor, " n"]:
    """`log integral prod_i N(y; mu_i, S_i)^c_i dy` at each of n points, with `sum c = 1`; j is n or 1 (MATH.md 7).

    The fused chain drops it. At equal variances `s^2 I` it is `-Var_c(mu) / (2 s^2)`. ValueError as `fuse`.
    """
    shares, root = fuse(coefficients.unsqueeze(-1), covariances)
    offsets = means - (shares @ means.unsqueeze(-1)).sum(0).squeeze(-1)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(covariances), offsets.unsqueeze(-1), upper=False)
    squares = whitened.square().sum((-2, -1)) + torch.linalg.slogdet(covariances).logabsdet
    return torch.linalg.slogdet(root).logabsdet - 0.5 * (coefficients @ squares)


def _stacked(variances: Mapping[str, Tensor | float | int], names: Sequence[str]) -> Float[Tensor, "m k q q"]:
    """Covariances in the order of `names`: k is n or 1, and q is 1 where all are numbers."""
    if set(variances) != set(names):
        raise ValueError(f"variances are needed for {sorted(names)}, received {sorted(variances)}")
    values = [torch.as_tensor(variances[name], dtype=torch.float64) for name in names]
    identity = torch.eye(max(value.shape[-1] if value.ndim else 1 for value in values)).to(values[0])
    matrices = [value if value.ndim else value * identity for value in values]
    for name, value, matrix in zip(names, values, matrices, strict=True):
        if matrix.ndim not in (2, 3) or matrix.shape[-2:] != identity.shape:
            shape = tuple(value.shape)
            raise ValueError(f'variance of "{name}" must be a number, (d, d) or (n, d, d), received shape {shape}')
        if not _is_covariance(matrix):
            received = value.tolist() if value.ndim < 3 else "one of a step that is not"
            raise ValueError(f'variance of "{name}" must be positive (definite) and finite, received {received}')
    return torch.stack(torch.broadcast_tensors(*(matrix.reshape(-1, *identity.shape) for matrix in matrices)))


def _is_covariance(matrices: Tensor) -> bool:
    asymmetry = (matrices - matrices.mT).abs().max()
    if not bool(matrices.isfinite().all()) or bool(asymmetry > 1e-9 * matrices.abs().max()):
        return False
    return not bool(torch.linalg.cholesky_ex(matrices).info.any())


def _apply(matrices: Float[Tensor, "k q q"], x: Points) -> Points:
    """A matrix a sample, or one for all; 1 x 1 matrices scale events of any shape."""
    if len(matrices) not in (1, len(x)):
        raise ValueError(f"one preference or covariance a sample: {len(x)} samples, received {len(matrices)}")
    matrices = matrices.to(x)
    if matrices.shape[-1] == 1:
        return matrices.reshape(-1, *[1] * (x.ndim - 1)) * x
    if x.shape[1:] != matrices.shape[-1:]:
        raise ValueError(
            f"covariances {tuple(matrices.shape)} need points (n, {matrices.shape[-1]}), received {tuple(x.shape)}"
        )
    return (matrices @ x.unsqueeze(-1)).squeeze(-1)
