"""For any differentiable coupling `x_0 = T_x(omega)` of the posteriors, `gap = E[(e^R/F - 1) grad_x eta]` with
`eta = R(T_x(omega)) - E[R|x_t = x]`, so that `|gap| <= L1 L2` without the third term of the paper's Lemma 2.

No density of R is needed. L1 depends on the coupling: the quantile coupling in 1-D, the affine one for a single
Gaussian component in more dimensions. Between separated components quantiles move fast and the bound is loose.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dbtheory.bounds import pathwise_lemma
from dbtheory.dispersion import Given
from dbtheory.reward import Reward
from dbtheory.reward_law import derivatives
from proofs_check.claim import Row
from proofs_check.problems import Problem, bounded_reward, random_problems, reference_gap, violations

SOURCE = "in place of paper Lemma 2; MATH.md 5"


def check() -> Iterator[Row]:
    line = list(_one_dimensional(2000))
    yield from _rows("in 1-D, quantile coupling", line)
    space = random_problems(60, (2, 3), 2, rewards=1, components=1)
    yield from _rows("of one component in 2 and 3-D, affine coupling", [(p, p.combined) for p in space])
    errors = torch.cat([_shifted_coupling_error(problem, reward) for problem, reward in line[:400]])
    yield Row(
        "negative control: share of the points where the identity errs by 1 % of |gap| if all quantiles shift alike",
        float((errors > 0.01).double().mean()),
        0.5,
        ">=",
    )


def _one_dimensional(count: int) -> Iterator[tuple[Problem, Reward]]:
    generator = torch.Generator().manual_seed(3)
    for index, problem in enumerate(random_problems(count, (1,), 0, points=1, rewards=1)):
        yield problem, bounded_reward(problem, generator) if index % 2 else problem.combined


def _rows(name: str, problems: Sequence[tuple[Problem, Reward]]) -> Iterator[Row]:
    lemmas = [pathwise_lemma(*p.arguments(reward)) for p, reward in problems]
    references = [reference_gap(problem, reward) for problem, reward in problems]
    pairs = zip(lemmas, references, strict=True)
    errors = torch.cat([(lemma.identity - gap).norm(dim=-1) for lemma, gap in pairs])
    gaps = torch.cat([gap.norm(dim=-1) for gap in references])
    bounds = torch.cat([lemma.bound for lemma in lemmas])
    yield Row(f"identity, {name}: largest error relative to 1 + |gap|", float((errors / (1 + gaps)).max()), 1e-9)
    yield violations(f"of |gap| <= L1 L2 {name}", gaps, bounds, len(problems))


def _shifted_coupling_error(problem: Problem, reward: Reward) -> Tensor:
    """The identity with `dT_x/dx = d E[x_0|x]/dx` at every quantile, which is right for one component only."""
    given = Given(*problem.arguments(reward))
    slope, _ = derivatives(given.R, given.posterior.mean + given.line.offsets)
    shift = given.ratio * given.posterior.covariance.flatten()
    wrong = shift * given.line.tilt_mean(slope)
    gap = reference_gap(problem, reward).squeeze(-1)
    return (wrong - gap).abs() / gap.abs()
