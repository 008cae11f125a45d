"""Lemma 2 as printed, `|gap| <= L1 L2 + L3`, is defined in 1-D only, where it holds because L1 L2 alone does; its
L3, its proof and three remarks on it fail.

L3 is `(1 + 1/alpha) sup_r |grad_x log p_R(r|x) + d_r log p_R(r|x)|`. The proof splits the gap into I_1, where the
gradient acts on R along a path, and I_2, where it acts on p_R, and bounds I_2 by L3. But each of them is the whole gap.
"""

import math
from collections.abc import Iterator

import torch

from dbtheory import GaussianMixture, LinearReward, VPLinear, jensen_gap
from dbtheory.bounds import PrintedLemma2, density_lemma, lemma_2_as_printed, pathwise_lemma
from dbtheory.dispersion import Given
from dbtheory.reward import SmoothReward
from dbtheory.reward_law import RewardLaw, derivatives
from proofs_check.claim import Row
from proofs_check.problems import random_problems, reference_gap, violations

SOURCE = "paper Lemma 2, Remark 4; MATH.md 5"
SCHEDULE = VPLinear()
POINT = torch.tensor([[0.7]]).double()
STEEP, STEEP_NAME = LinearReward(torch.tensor([2.0]).double()), "N(0, 1), R = 2 x_0"


def check() -> Iterator[Row]:
    yield from _where_defined()
    yield from _linear_reward_on_a_gaussian()
    yield from _counted_twice()
    yield _axes()
    yield from _constant()
    yield from _bounded_reward()


def _where_defined() -> Iterator[Row]:
    """Linear rewards in 1-D, the supremum over three standard deviations of R."""
    gaps, printed, short = [], [], []
    for problem in random_problems(100, (1,), 9, points=4, rewards=1):
        reward = LinearReward(problem.rewards[0].b)
        lemma = lemma_2_as_printed(*problem.arguments(reward))
        gaps.append(reference_gap(problem, reward).norm(dim=-1))
        printed.append(lemma.bound)
        short.append(lemma.L1 * lemma.L2)
    gap, long, alone = (torch.cat(parts) for parts in (gaps, printed, short))
    for name, bound in (("L1 L2 + L3 (three standard deviations)", long), ("L1 L2 alone", alone)):
        yield violations(f"of |gap| <= {name} in 1-D, linear rewards", gap, bound, 100)


def _standard_normal(dim: int) -> GaussianMixture:
    return GaussianMixture(torch.ones(1).double(), torch.zeros(1, dim).double(), torch.eye(dim)[None].double())


def _linear_reward_on_a_gaussian() -> Iterator[Row]:
    """`x_0 ~ N(0, 1)`, `R = 2 x_0`: R given x_t is `2 a x_t` plus independent Gaussian noise, and the gap is zero."""
    gap = max(float(jensen_gap(_standard_normal(1), STEEP, 1.0, SCHEDULE, POINT, t).abs()) for t in (0.001, 0.1, 0.3))
    yield Row(f"largest |gap| ({STEEP_NAME}, t = 0.001, 0.1 and 0.3)", gap, 1e-10)
    yield from _L3_where_the_gap_is_zero()
    yield _L2_where_the_gap_is_zero()


def _printed(t: float, deviations: float = 3.0) -> PrintedLemma2:
    return lemma_2_as_printed(_standard_normal(1), STEEP, 1.0, SCHEDULE, POINT, t, deviations=deviations)


def _L3_where_the_gap_is_zero() -> Iterator[Row]:
    yield Row(
        f"L3 is a bound ({STEEP_NAME}, t = 0.1): yet the supremum is infinite; from 3 to 12 standard deviations it "
        "grows by the factor",
        float(_printed(0.1, 12).L3 / _printed(0.1).L3),
        3.9,
        ">=",
        refutes=True,
    )
    yield Row(
        f"L3 = 0 where R = k(x_t) + noise ({STEEP_NAME}, t = 0.1): yet at three standard deviations it is",
        float(_printed(0.1).L3),
        1.0,
        ">=",
        refutes=True,
    )
    yield Row(
        f"L3 -> 0 as t -> 0 ({STEEP_NAME}): yet from t = 0.1 to 0.001, at three standard deviations, it "
        "grows by the factor",
        float(_printed(0.001).L3 / _printed(0.1).L3),
        5.0,
        ">=",
        refutes=True,
    )
    half = ((0.0025 + 19.9 * math.log(2)) ** 0.5 - 0.05) / 9.95  # alpha_t = 1/2: there alone k has the slope 1
    yield Row(f"L3 where grad k = 1 ({STEEP_NAME}, alpha_t = 1/2)", float(_printed(half).L3), 1e-10)


def _L2_where_the_gap_is_zero() -> Row:
    given = Given(_standard_normal(1), STEEP, 1.0, SCHEDULE, POINT, 0.3)
    mean, deviation = 2 * float(given.posterior.mean), 2 * float(given.posterior.covariance) ** 0.5
    return Row(
        f"L2 is the variation of R, sd(R)/E[R] ({STEEP_NAME}, t = 0.3): yet it is larger, being that of e^R, by "
        "the factor",
        float(_printed(0.3).L2) / (deviation / abs(mean)),
        1.5,
        ">=",
        refutes=True,
    )


def _counted_twice() -> Iterator[Row]:
    """I_1 and I_2 as the proof defines them, R's path by the quantile coupling."""
    prior = GaussianMixture(
        torch.tensor([0.4, 0.6]).double(),
        torch.tensor([[-1.0], [1.5]]).double(),
        torch.tensor([[[0.5]], [[0.9]]]).double(),
    )
    given = (prior, LinearReward(torch.tensor([1.2]).double()), 1.0, SCHEDULE, POINT, 0.3)
    gap, along_path, in_density = jensen_gap(*given), pathwise_lemma(*given).identity, density_lemma(*given).gap
    yield Row("I_1 is the whole gap: relative difference", float((along_path / gap - 1).abs()), 1e-9)
    yield Row("I_2 is the whole gap: relative difference", float((in_density / gap - 1).abs()), 1e-9)
    error = float(((along_path + in_density - gap) / gap).abs())
    yield Row("gap = I_1 + I_2: yet the sum errs, relative to the gap, by", error, 0.99, ">=", refutes=True)


def _axes() -> Row:
    """The sum of a vector and a number, read coordinate by coordinate, in the plane."""

    def L3(sign: float) -> float:
        reward = LinearReward(sign * torch.tensor([2.0, 1.0]).double())
        given = Given(_standard_normal(2), reward, 1.0, SCHEDULE, sign * torch.tensor([[0.7, 0.2]]).double(), 0.2)
        law = RewardLaw.of(given)
        inside = law.line.excess.abs() <= 3 * law.line.mean(law.line.excess.square()).sqrt().unsqueeze(-1)
        return float((law.score_x + law.score_r.unsqueeze(-1)).norm(dim=-1)[inside].max())

    what = "L3 in the plane, a number added to each coordinate: yet it depends on the axes; flipping both changes it by"
    return Row(f"{what} the factor", L3(-1) / L3(1), 2.0, ">=", refutes=True)


def _constant() -> Iterator[Row]:
    """Rewards in [-2, 2], alpha = 0.2: R in [-10, 10]. Of two bumps at R = -9 and 9, both shifting with x, one gains
    weight: `p_R(r|x) = w(x) B(r - x + 9) + (1 - w(x)) B(r - x - 9)`. The printed sum is 1 on one and -1 on the other.
    """
    alpha, width = 0.2, 1.0
    centre = 2 / alpha - width
    e = torch.linspace(-width, width, 2003, dtype=torch.float64)[1:-1]
    r = torch.cat([e - centre, e + centre]).requires_grad_(True)
    x = torch.zeros_like(r).requires_grad_(True)
    sign = torch.where(r.detach() < 0, 1.0, -1.0)
    bump = 2 * torch.cos(torch.pi * (r - x + sign * centre) / (2 * width)).log()
    log_p = bump + torch.nn.functional.logsigmoid(2 * sign * x)
    score_x, score_r = torch.autograd.grad(log_p.sum(), (x, r))
    p, R, total = log_p.detach().softmax(0), r.detach(), score_x + score_r
    second = float(((p.log() + R).softmax(0) - p * R) @ total)  # I_2 = E'[Delta] - E[R Delta]
    largest = float(total.abs().max())
    name = "two bumps of R, rewards in [-2, 2], alpha = 0.2"
    yield Row(
        f"|I_2| <= L3, whose constant is 1 + 1/alpha ({name}): yet |I_2|/L3 is",
        abs(second) / ((1 + 1 / alpha) * largest),
        1.0,
        ">=",
        refutes=True,
    )
    yield Row(f"|I_2| over (1 + 2/alpha) sup ({name})", abs(second) / ((1 + 2 / alpha) * largest), 1.0)


def _bounded_reward() -> Iterator[Row]:
    """`R = 4 Phi(z) - 2`, z the posterior's standard score: uniform on [-2, 2], so that `d_r p_R = 0` inside."""
    given = Given(_standard_normal(1), LinearReward(torch.ones(1).double()), 1.0, SCHEDULE, POINT, 0.3)
    mean, deviation = given.posterior.mean, given.posterior.covariance.squeeze(-1).sqrt()
    reward = SmoothReward(lambda x: 4 * torch.special.ndtr((x.squeeze(-1) - mean) / deviation) - 2)
    z = torch.linspace(-6, 6, 2001, dtype=torch.float64)[None]
    slope, curvature = derivatives(reward, mean + deviation * z)
    p, R = (-0.5 * z.square()).softmax(-1), reward((mean + deviation * z).unsqueeze(-1))
    score_r = (-z / deviation - curvature / slope) / slope
    integral = float((p * R * score_r).sum())
    yield Row(
        "a bounded R meets the boundary condition, so that int r d_r p_R dr = -1: yet it differs (R uniform) by",
        abs(integral + 1),
        0.99,
        ">=",
        refutes=True,
    )
