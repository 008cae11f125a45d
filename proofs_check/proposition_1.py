"""The drift of the aligned model is the base model's minus `g^2 u`, with `u = grad_x log E[e^{r(x_0)/alpha} | x_t = x]`
under the base model's posterior.

The aligned drift comes from the score of the noised target (tilt, then noise); u is computed from the base model's
posterior (noise, then tilt) by autograd, and for d <= 3 also as a covariance by Gauss-Hermite. Errors are relative to
the largest of `g^2 |u|`, `g^2 |grad E[R|x]|` and `g^2` times their distance at the point: the base drift, common to
both sides, does not count.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dbtheory import VE, RectifiedFlow, VPLinear, control, jensen_control, tilt
from dbtheory.reward import QuadraticReward
from proofs_check.claim import Row
from proofs_check.problems import Problem, bounded_reward, random_problems, reverse_drift

SOURCE = "paper Proposition 1, eq. 7; MATH.md 3"
DIMENSIONS = tuple(range(1, 9))
NAMES = {VPLinear: "variance preserving", VE: "variance exploding", RectifiedFlow: "rectified flow"}


def check() -> Iterator[Row]:
    problems = list(random_problems(3 * 8 * 10, DIMENSIONS, seed=1, rewards=1))
    low = [problem for problem in problems if problem.prior.dim <= 3]
    for kind, name in NAMES.items():
        mine = [problem for problem in problems if isinstance(problem.schedule, kind)]
        few = [problem for problem in mine if problem.prior.dim <= 3]
        yield Row(
            f"{name}: noised target against u by autograd, {len(mine)} problems in 1 to 8 dimensions",
            max(float(_errors(p, _by("autograd")).max()) for p in mine),
            1e-10,
        )
        yield Row(
            f"{name}: noised target against u by Gauss-Hermite, {len(few)} problems in 1 to 3 dimensions",
            max(float(_errors(p, _by("quadrature")).max()) for p in few),
            1e-10,
        )
    yield Row("a bounded reward in 1 dimension: target on a grid, u by Gauss-Hermite", _bounded_error(), 1e-5)
    yield Row("negative control: median error with alpha off by 1 %", _median(low, _by("autograd", 1.01)), 1e-3, ">=")
    yield Row("negative control: median error with grad E[R|x] in place of u", _median(low, _jensen), 1e-2, ">=")


Control = Callable[[Problem], Tensor]


def _by(route: str, alpha_factor: float = 1.0) -> Control:
    # Three nodes are exact: the rule follows e^R, and what remains is a polynomial of degree one.
    return lambda p: control(*p.arguments(alpha=alpha_factor * p.alpha), route=route, order=3)


def _jensen(problem: Problem) -> Tensor:
    return jensen_control(*problem.arguments())


def _errors(problem: Problem, u: Control) -> Tensor:
    """`|f_target - (f_prior - g^2 u)|` at each point, relative to the largest term."""
    p = problem
    target = tilt(p.prior, p.combined, p.alpha)
    g2, added = p.schedule.diffusion_squared(p.t), u(p)
    difference = reverse_drift(p, target) - (reverse_drift(p, p.prior) - g2 * added)
    exact, jensen = control(*p.arguments()), _jensen(p)
    largest = torch.stack([term.norm(dim=-1) for term in (exact, jensen, exact - jensen)]).amax(0)
    return difference.norm(dim=-1) / (g2 * largest)


def _median(problems: list[Problem], u: Control) -> float:
    return float(torch.cat([_errors(problem, u) for problem in problems]).median())


def _bounded_error() -> float:
    """The largest over problems of `|score_target - score_prior - u|` against the largest `|u|` of its points."""
    worst, generator = 0.0, torch.Generator().manual_seed(2)
    for p in random_problems(12, (1,), seed=3, rewards=1, lowest_t=0.1):
        reward = bounded_reward(p, generator)
        assert not isinstance(reward, QuadraticReward)
        target, prior = (law.noised(p.schedule, p.t) for law in (tilt(p.prior, reward, p.alpha), p.prior))
        u = control(*p.arguments(reward), order=200)
        difference = target.score(p.x) - prior.score(p.x) - u
        worst = max(worst, float(difference.abs().max() / u.abs().max()))
    return worst
