"""MSDDA's fused step `S^-1 = sum_i c_i S_i^-1`, `mu = S sum_i c_i S_i^-1 mu_i` minimises the step's objective
`sum_i c_i KL(. || N(mu_i, S_i))` for any number of experts with the base, at any KL scale where S^-1 is positive
definite; at equal variances it is DB-MPA.

"No approximation error" is about that objective. Against the target the chain forgets each step's normaliser: with
the experts' exact kernels a Gaussian world still ends elsewhere, and at the target once the normaliser is put back.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy import optimize
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from dbtheory import ExactExperts, MeanBlend, PrecisionBlend, Preference, QuadraticReward, VPLinear
from dbtheory.blend import Step
from dbtheory.kernels import exact_kernels
from dbtheory.metrics import gaussian_w2
from dbtheory.mixture import GaussianMixture
from dbtheory.precision import fuse, log_normalizer
from dbtheory.steps import ddpm_step
from proofs_check.claim import Row
from proofs_check.problems import random_problems

SOURCE = "Wang, Zhang and Zou 2026 (MSDDA); MATH.md 7"
EYE = torch.eye(2, dtype=torch.float64)


def check() -> Iterator[Row]:
    yield from _optimum()
    yield from _mass()
    yield _equal_variances()
    yield _refused()
    yield from _forgotten_normalizer()


@dataclass(frozen=True)
class Kernels:
    """Coefficients (m,) summing to 1, the base's first, means (m, d) and covariances (m, d, d) of a step's kernels."""

    c: Tensor
    means: Tensor
    covariances: Tensor

    @property
    def fused(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, covariance and log-normaliser by the formulas under test."""
        shares, root = fuse(self.c[:, None], self.covariances[:, None])
        mean = (shares[:, 0] @ self.means[..., None]).sum(0)[:, 0]
        return mean, (root @ root.mT)[0], log_normalizer(self.c, self.means[:, None], self.covariances[:, None])[0]


def _kernels(count: int, dim: int, seed: int) -> Iterator[Kernels]:
    """Two to four kernels; the base's coefficient is below 0 (lambda > 1) in every other problem."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        m = 2 + index % 3
        c = 0.2 + torch.rand(m, generator=generator, dtype=torch.float64)
        c[0] = (0.3, -0.15)[index % 2]
        c[1:] *= (1 - c[0]) / c[1:].sum()
        factors = torch.randn(m, dim, dim, generator=generator, dtype=torch.float64)
        covariances = 0.3 * factors @ factors.mT + (0.4 + 0.3 * (torch.arange(m) == 0))[:, None, None] * torch.eye(dim)
        yield Kernels(c, torch.randn(m, dim, generator=generator, dtype=torch.float64), covariances)


def _optimum() -> Iterator[Row]:
    apart, values = [], []
    for kernels in _kernels(12, 2, seed=0):
        mean, covariance, log_c = kernels.fused
        found = optimize.minimize(
            _objective, np.zeros(5), args=(kernels,), jac=True, method="BFGS", options={"gtol": 1e-10}
        )
        best_mean, best_root = _unpack(torch.from_numpy(found.x))
        apart.append(
            float(torch.cat([best_mean - mean, (best_root @ best_root.mT - covariance).flatten()]).abs().max())
        )
        values.append(abs(float(found.fun) + float(log_c)))
    yield Row(
        "BFGS over mean and covariance from N(0, I), 12 random steps of 2-4 kernels in 2-D: distance", max(apart), 1e-6
    )
    yield Row("the objective's least value against minus the log-normaliser", max(values), 1e-9)


def _objective(parameters: np.ndarray, kernels: Kernels) -> tuple[float, np.ndarray]:
    """`sum_i c_i KL(N(m, LL') || N(mu_i, S_i))` and its gradient, with torch's own divergence."""
    point = torch.from_numpy(parameters).requires_grad_()
    mean, root = _unpack(point)
    moved = MultivariateNormal(mean, scale_tril=root)
    value = kernels.c @ kl_divergence(moved, MultivariateNormal(kernels.means, kernels.covariances))
    (gradient,) = torch.autograd.grad(value, point)
    return value.item(), gradient.numpy()


def _unpack(point: Tensor) -> tuple[Tensor, Tensor]:
    """A mean in the plane, and a triangular root with a positive diagonal."""
    root = torch.diag(point[2:4].exp()) + torch.diag(point[4:5], -1)
    return point[:2], root


def _mass() -> Iterator[Row]:
    """The trapezoidal rule on Gaussians errs below rounding at a spacing of a fraction of their width."""
    axis = torch.linspace(-16, 16, 321, dtype=torch.float64)
    for dim, points in ((1, axis[:, None]), (2, torch.cartesian_prod(axis, axis))):
        errors = []
        for kernels in _kernels(12, dim, seed=1):
            laws = MultivariateNormal(kernels.means, kernels.covariances)
            exact = (laws.log_prob(points[:, None]) @ kernels.c).logsumexp(0) + dim * float((axis[1] - axis[0]).log())
            errors.append(abs(float(exact - kernels.fused[2])))
        yield Row(
            f"log-normaliser against quadrature of prod_i N(mu_i, S_i)^c_i in {dim}-D, 12 random steps",
            max(errors),
            1e-9,
        )


def _equal_variances() -> Row:
    worst = 0.0
    for index, problem in enumerate(random_problems(30, (1, 2, 3), seed=5)):
        experts = ExactExperts(problem.prior, problem.named, problem.alpha, problem.schedule)
        preference = Preference(dict(zip(problem.named, problem.w, strict=True)), (0.5, 1.0, 1.7)[index % 3])
        step = Step(0, 1, problem.t, 0.0, torch.zeros(len(problem.x), dtype=torch.float64))
        covariance: Tensor | float = 0.3 * torch.eye(problem.prior.dim, dtype=torch.float64) if index % 2 else 0.3
        blends = (MeanBlend(preference), PrecisionBlend(preference, dict.fromkeys(experts.names, covariance)))
        mean, fused = (blend(experts, problem.x, problem.t, step) for blend in blends)
        worst = max(worst, float((mean - fused).norm() / mean.norm()))
    return Row("equal variances: MSDDA's prediction against DB-MPA's, 30 random problems, relative", worst, 1e-12)


def _refused() -> Row:
    """The base's precision is 4 times the expert's, so that S^-1 = (4 - 3 lambda) I; lambda = 4/3 is the border."""
    accepted = 0
    for scale in (4 / 3, 1.4, 2.0, 5.0):
        try:
            PrecisionBlend(Preference({"expert": 1.0}, scale), {"base": 0.25, "expert": 1.0})
            accepted += 1
        except ValueError:
            pass
    return Row("blended precisions that are not positive definite and were accepted, of 4", accepted, 0)


def _forgotten_normalizer() -> Iterator[Row]:
    """Gaussian prior, quadratic rewards, exact kernels: every chain is affine, and every normaliser quadratic in x.

    Started at the exact product of the experts' laws at t = 1, so that nothing but the steps can err.
    """
    rewards = {
        "round": QuadraticReward(0.8 * EYE, torch.tensor([1.0, -0.5], dtype=torch.float64)),
        "long": QuadraticReward(torch.tensor([[-0.1, 0.1], [0.1, 1.5]], dtype=torch.float64), -0.5 * EYE[0]),
    }
    prior = GaussianMixture(torch.ones(1, dtype=torch.float64), 0.5 * EYE[:1], 0.7 * EYE[None])
    experts = ExactExperts(prior, rewards, 0.7, VPLinear(), "x0")
    for scale in (0.5, 1.0, 1.6):
        preference = Preference({"round": 0.3, "long": 0.7}, scale)
        c = torch.tensor(list(preference.coefficients().values()), dtype=torch.float64)
        target = _product(experts, c, 0.0)
        for steps in (4, 64):
            kept, forgotten = (_chain(experts, c, steps, keep) for keep in (True, False))
            name = f"lambda = {scale:g}, {steps} exact steps"
            distance = gaussian_w2(forgotten.mean, forgotten.covariance, target.mean, target.covariance)
            yield Row(f"{name}: W2 of the fused chain to the target", distance, 0.005, ">=")
            error = float((kept.numbers - target.numbers).abs().max())
            yield Row(f"{name}: error of mass, mean and covariance with the normaliser", error, 1e-9)


@dataclass(frozen=True)
class Weighted:
    """The measure `exp(log_mass) N(mean, covariance)`."""

    log_mass: Tensor
    mean: Tensor
    covariance: Tensor

    @property
    def numbers(self) -> Tensor:
        return torch.cat([self.log_mass.reshape(1), self.mean, self.covariance.flatten()])


def _product(experts: ExactExperts, c: Tensor, t: float) -> Weighted:
    """`prod_i p_{i,t}^(c_i)`, whose factors are Gaussian."""
    laws = [law.noised(experts.schedule, t) for law in experts.targets.values()]
    mixtures = [law for law in laws if isinstance(law, GaussianMixture)]
    parts = torch.cat([law.means for law in mixtures]), torch.cat([law.covariances for law in mixtures])
    mean, covariance, log_mass = Kernels(c, *parts).fused
    return Weighted(log_mass, mean, covariance)


def _chain(experts: ExactExperts, c: Tensor, steps: int, keep_normalizer: bool) -> Weighted:
    """The law that the fused kernels end with, weighted by each step's normaliser or not."""
    law = _product(experts, c, 1.0)
    for t, t_next in pairwise(torch.linspace(1, 0, steps + 1, dtype=torch.float64)):
        # affine maps and quadratics are known from their values at a few points
        points = torch.cat([0 * EYE[:1], EYE, -EYE, EYE.sum(0, keepdim=True)])
        x0 = experts.predict(points, t, list(experts.names))
        means = torch.stack([ddpm_step(points, guess, t, t_next, 0 * points, experts.schedule) for guess in x0])
        covariances = torch.stack(list(exact_kernels(experts)(points, t, t_next).values()))
        shares, root = fuse(c[:, None], covariances)
        mapped = (shares @ means[..., None]).sum(0)[..., 0]
        if keep_normalizer:
            law = _times(law, log_normalizer(c, means, covariances))
        matrix = (mapped[1:3] - mapped[0]).T
        noise = (root @ root.mT)[0]
        law = Weighted(law.log_mass, matrix @ law.mean + mapped[0], matrix @ law.covariance @ matrix.T + noise)
    return law


def _times(law: Weighted, values: Tensor) -> Weighted:
    """Times `exp(q(x))` for the quadratic q with these values at 0, e1, e2, -e1, -e2 and e1 + e2."""
    constant, plus, minus, both = values[0], values[1:3], values[3:5], values[5]
    slope, bend = 0.5 * (plus - minus), plus + minus - 2 * constant
    cross = both - constant - slope.sum() - 0.5 * bend.sum()
    curvature = torch.diag(bend) + cross * EYE.flip(0)
    before = torch.linalg.inv(law.covariance)
    after = before - curvature
    mean = torch.linalg.solve(after, before @ law.mean + slope)
    energies = 0.5 * (mean @ after @ mean - law.mean @ before @ law.mean + before.logdet() - after.logdet())
    return Weighted(law.log_mass + constant + energies, mean, torch.linalg.inv(after))
