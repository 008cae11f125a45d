"""If `p_R`, `r p_R` and `e^r p_R` vanish at both ends of R's support, `gap = E[(e^R/F - c R) D]` for every c, with
`D = grad_x log p_R(r|x) + d_r log p_R(r|x) grad_x E[R|x]`, so that `|gap| <= sd(e^R/F - c R) sqrt(E|D|^2)`.

Because `E[D] = E[R D] = 0`. At c = 0 the first factor is the paper's L2; the least bound is at the regression
coefficient of e^R/F on R. Without the hypothesis the statement is false. The bound need not be tight: where alpha is
small against a reward, as for a tenth of the linear ones here, the spread of e^R/F is exponentially large.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy import integrate, special
from torch import Tensor

from dbtheory import GaussianMixture, LinearReward, QuadraticReward, RectifiedFlow, jensen_gap
from dbtheory.bounds import density_lemma
from dbtheory.reward import Reward, SmoothReward
from dbtheory.reward_law import HypothesisError
from proofs_check.claim import Row
from proofs_check.problems import Problem, random_problems, reference_gap, violations

SOURCE = "in place of paper Lemma 2; MATH.md 5"
SHAPES: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.asinh,
    lambda z: 0.2 * z + z.tanh(),
    lambda z: z + 0.8 * z.sin(),
    lambda z: torch.logaddexp(z, 0 * z),  # softplus
)


def check() -> Iterator[Row]:
    generator = torch.Generator().manual_seed(4)
    line = [(p, _monotone(i, p, generator)) for i, p in enumerate(random_problems(1000, (1,), 5, points=1, rewards=1))]
    yield from _rows("in 1-D, strictly monotone rewards", line)
    space = [(p, LinearReward(p.rewards[0].b)) for p in random_problems(1000, (1, 2, 3), 6, points=1, rewards=1)]
    yield from _rows("in 1 to 3 dimensions, linear rewards", space)
    yield from _counterexample()


def _monotone(index: int, problem: Problem, generator: torch.Generator) -> Reward:
    """Strictly monotone, up or down, of size `alpha`, bending at a random place among the prior's components."""
    sharpness, size, sign = (torch.rand(3, generator=generator, dtype=torch.float64) + 0.5).tolist()
    place = float(problem.prior.means[0])
    shape, scale = SHAPES[index % len(SHAPES)], problem.alpha * size * (1 if sign > 1 else -1)
    return SmoothReward(lambda x: scale * shape(sharpness * (x.squeeze(-1) - place)))


def _rows(name: str, problems: Sequence[tuple[Problem, Reward]]) -> Iterator[Row]:
    lemmas = [density_lemma(*p.arguments(reward)) for p, reward in problems]
    gaps = [reference_gap(problem, reward) for problem, reward in problems]
    gap = _norms(gaps)
    # of the terms that cancel in these means
    scale = torch.cat([(1 + lemma.L2) * lemma.size_D + 1 for lemma in lemmas])
    errors = {
        "gap = E[(e^R/F) D]": [lemma.identity - gap for lemma, gap in zip(lemmas, gaps, strict=True)],
        "E[D] = 0": [lemma.mean_D for lemma in lemmas],
        "E[R D] = 0": [lemma.mean_RD for lemma in lemmas],
    }
    for identity, error in errors.items():
        largest = float((_norms(error) / scale).max())
        yield Row(f"{identity} {name}: largest error / size of the averaged terms", largest, 1e-9)
    bounds = {
        "c = 0": [lemma.bound for lemma in lemmas],
        "c = 1": [lemma.unit_bound for lemma in lemmas],
        "the best c": [lemma.best_bound for lemma in lemmas],
    }
    for c, bound in bounds.items():
        yield violations(f"of the bound at {c} {name}", gap, torch.cat(bound), len(problems))


def _norms(vectors: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.norm(dim=-1) for part in vectors])


def _counterexample() -> Iterator[Row]:
    """The posterior N(0.8 x, I) in the plane at |x| = 1: R's maximum, 0, puts mass at the end of its support."""
    t = (6.5625**0.5 - 1.25) / 2  # rectified flow: (1 - t)/t^2 = 0.8
    variance = t**2 / (t**2 - (1 - t) ** 2)
    prior = GaussianMixture(torch.ones(1).double(), torch.zeros(1, 2).double(), variance * torch.eye(2)[None].double())
    reward = QuadraticReward(5 * torch.eye(2).double(), torch.zeros(2).double())
    point = torch.tensor([[1.0, 0.0]]).double()
    gap = float(jensen_gap(prior, reward, 1.0, RectifiedFlow(), point, t).norm())
    identity, bound = _radial_terms()
    name = "R = -5/2 |x_0|^2 in the plane, p_R > 0 at the end of its support"
    yield Row(f"without the hypothesis ({name}): gap over the would-be bound", gap / bound, 1.0, ">=")
    yield Row(
        f"without the hypothesis: E[(e^R/F) D] = {identity:.2f} is far from gap = {gap:.3f}, by",
        gap - identity,
        3.0,
        ">=",
    )
    try:
        density_lemma(prior, reward, 1.0, RectifiedFlow(), point, t)
        refused = 0
    except HypothesisError:
        refused = 1
    yield Row("density_lemma refuses R = -5/2 |x_0|^2 in the plane: 1 where it does", refused, 1, ">=")


def _radial_terms() -> tuple[float, float]:
    """`E[(e^R/F) D]` and `L2 sqrt(E|D|^2)` along x, from the density of `rho = |x_0|^2 = -R/2.5`, a noncentral
    chi-square of 2 degrees whose mean vector has length `m = 0.8 |x|`."""
    m, gain, curvature = 0.8, 0.8, 2.5

    def density(rho: float) -> float:
        return 0.5 * np.exp(-0.5 * (np.sqrt(rho) - m) ** 2) * special.i0e(m * np.sqrt(rho))

    def D(rho: float) -> float:
        growth = special.i1e(m * np.sqrt(rho)) / special.i0e(m * np.sqrt(rho))  # (log I_0)'
        along_x = gain * (np.sqrt(rho) * growth - m)
        along_r = (0.5 * m * growth / np.sqrt(rho) - 0.5) / -curvature
        return along_x + along_r * gain * -curvature * 2 * m  # E[R|x] = -curvature (m^2 + 2)

    def mean(function: Callable[[float], float]) -> float:
        return integrate.quad(lambda rho: function(rho) * density(rho), 0, 200, limit=200, epsabs=1e-12)[0]

    F, second = mean(lambda rho: np.exp(-curvature * rho)), mean(lambda rho: np.exp(-2 * curvature * rho))
    identity = mean(lambda rho: np.exp(-curvature * rho) * D(rho)) / F
    return identity, (second / F**2 - 1) ** 0.5 * mean(lambda rho: D(rho) ** 2) ** 0.5
