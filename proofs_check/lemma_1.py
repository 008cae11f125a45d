"""A blend of aligned drifts is the exact drift up to a blend of Jensen gaps: eq. 9 for a combination of rewards and
eq. 10 for another KL strength are identities once their remainders are kept.

Drifts come from the scores of noised targets, one target for each reward and strength; gaps come from covariances
under the base model's posterior, in closed form, and by autograd of `log E[e^R] - E[R]`. Errors are relative to the
largest `g^2 |u|` or `g^2 |gap|` of the identity at the point: the base drift, common to both sides, does not count.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dbtheory import jensen_gap, tilt
from dbtheory.reward import QuadraticReward
from proofs_check.claim import Row
from proofs_check.problems import Problem, random_problems, reverse_drift

SOURCE = "paper Lemma 1, eq. 9 and 10; MATH.md 4"
DIMENSIONS = tuple(range(1, 9))

Gap = Callable[[Problem, QuadraticReward, float], Tensor]


def check() -> Iterator[Row]:
    problems = list(random_problems(72, DIMENSIONS, seed=4, rewards=3))
    # The KL scale lambda takes its turns: from almost the base model to beyond the aligned one.
    scales = torch.linspace(0.05, 2.0, len(problems)).tolist()
    for name, gap in (("closed", _gap("closed")), ("by autograd", _gap("autograd"))):
        ninth, tenth = _errors(problems, scales, gap)
        yield Row(f"eq. 9, three rewards, gaps {name}: {len(problems)} problems", float(ninth.max()), 1e-10)
        yield Row(f"eq. 10, lambda from 0.05 to 2, gaps {name}", float(tenth.max()), 1e-10)
    ninth, tenth = _errors(problems, scales, lambda p, reward, alpha: torch.zeros_like(p.x))
    yield Row("negative control: median error of eq. 9 without its remainder", float(ninth.median()), 1e-2, ">=")
    yield Row("negative control: median error of eq. 10 without its remainder", float(tenth.median()), 1e-2, ">=")


def _gap(route: str) -> Gap:
    return lambda p, reward, alpha: jensen_gap(*p.arguments(reward, alpha), route=route)


def _errors(problems: Sequence[Problem], scales: Sequence[float], gap: Gap) -> tuple[Tensor, Tensor]:
    """The relative errors of both equations at every point."""
    ninth = [_equation_9(problem, gap) for problem in problems]
    tenth = [_equation_10(problem, scale, gap) for problem, scale in zip(problems, scales, strict=True)]
    return torch.cat(ninth), torch.cat(tenth)


def _equation_9(p: Problem, gap: Gap) -> Tensor:
    """`f_{r(w)} = sum w_i f_i + g^2 (sum w_i gap_i - gap_w)`."""
    rewards = [*p.rewards, p.combined]
    *drifts, exact = [reverse_drift(p, tilt(p.prior, reward, p.alpha)) for reward in rewards]
    *gaps, gap_w = [_g2(p) * gap(p, reward, p.alpha) for reward in rewards]
    blend, gaps_of_blend = _weighted(p.w, drifts), _weighted(p.w, gaps)
    base = reverse_drift(p, p.prior)
    return _relative(exact - (blend + gaps_of_blend - gap_w), [f - base for f in [*drifts, exact]] + [*gaps, gap_w])


def _equation_10(p: Problem, scale: float, gap: Gap) -> Tensor:
    """`f_{alpha/lambda} = (1 - lambda) f_prior + lambda f_r + g^2 (lambda gap_1 - gap_lambda)`."""
    reward = p.combined
    base, aligned = reverse_drift(p, p.prior), reverse_drift(p, tilt(p.prior, reward, p.alpha))
    exact = reverse_drift(p, tilt(p.prior, reward, p.alpha / scale))
    gap_1, gap_scaled = _g2(p) * gap(p, reward, p.alpha), _g2(p) * gap(p, reward, p.alpha / scale)
    blend = (1 - scale) * base + scale * aligned
    terms = [exact - base, aligned - base, gap_1, gap_scaled]
    return _relative(exact - (blend + scale * gap_1 - gap_scaled), terms)


def _g2(p: Problem) -> Tensor:
    return p.schedule.diffusion_squared(p.t)


def _weighted(w: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    return sum((weight * term for weight, term in zip(w, terms, strict=True)), torch.zeros_like(terms[0]))


def _relative(difference: Tensor, terms: Sequence[Tensor]) -> Tensor:
    largest = torch.stack([term.norm(dim=-1) for term in terms]).amax(0)
    return difference.norm(dim=-1) / largest
