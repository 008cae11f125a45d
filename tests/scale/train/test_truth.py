"""DPOK on a diffusion of affine Gaussian steps, where what it should learn is known in closed form (MATH.md 10).

Runs are judged by `sqrt(KL(learned || target) / KL(target || base))` in nats of whole trajectories: how far from the
target they end, as a share of the way from the base. Six seeds give a one-sided t-interval at the 1e-5 level. A run's
own noise leaves 2 to 5 % of the way; a target counts as reached where the interval ends below 10 %, as missed where it
begins above.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dbtheory import QuadraticReward
from proofs_check import stepwise
from scale.train.dpok import Record, train
from scale.train.settings import Dpok
from tests.chance import FALSE_ALARM
from tests.scale.train.gaussian import (
    GaussianPolicy,
    Quadratic,
    Steps,
    ancestral,
    marginals,
    objective,
    optimum,
    path_kl,
)

ALPHA, SEEDS, REACHED = 0.25, 6, 0.10
BARE: dict[str, Any] = {"trace": 1.0, "look_ahead": False, "value_updates": 0, "rounds": 60, "learning_rate": 0.06}
PLAIN: dict[str, Any] = {"trace": 1.0, "look_ahead": False, "value_updates": 5}
AHEAD: dict[str, Any] = {"trace": 0.0, "look_ahead": True, "value_updates": 10, "value_learning_rate": 3e-3}


def plane(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


REWARD = Quadratic(plane(0.8, 0.3, 0.3, 0.4).view(2, 2), plane(1.0, -0.5))


@cache
def base_of(steps: int) -> Steps:
    return ancestral(plane(0.3, 0.0), 1.5, steps, 0.3)


def learn(work: Path, steps: int, reward: Quadratic = REWARD, **options: Any) -> list[tuple[Steps, list[Record]]]:
    """What each seed's run learned, and its history."""
    runs = []
    for seed in range(SEEDS):
        settings = Dpok(**{
            "alpha": ALPHA, "rounds": 80, "prompts_per_round": 1, "samples_per_prompt": 512, "rollout_batch": 512,
            "steps": steps, "buffer": 0, "updates": 2, "batch": 256 * steps, "microbatch": 256 * steps, "clip": 0.2,
            "learning_rate": 0.03, "weight_decay": 0.0, "max_grad_norm": 1e9, "precision": "no", "max_ratio": 5.0,
            "checkpoint_every": 10**6, "seed": seed, **options,
        })  # fmt: skip
        policy = GaussianPolicy(base_of(steps))
        history = train(policy, reward, ["a prompt"], settings, work / str(seed))
        runs.append((policy.learned, history))
    return runs


def interval(runs: Sequence[tuple[Steps, list[Record]]], target: Steps) -> tuple[float, float]:
    """The one-sided t-bounds of the runs' mean distance to the target, as a share of its way from the base."""
    base = base_of(len(target))
    shares = np.array([float((path_kl(learned, target) / path_kl(target, base)).sqrt()) for learned, _ in runs])
    margin = stats.t.isf(FALSE_ALARM, len(shares) - 1) * shares.std(ddof=1) / len(shares) ** 0.5
    return shares.mean() - margin, shares.mean() + margin


def reached(runs: Sequence[tuple[Steps, list[Record]]], target: Steps) -> bool:
    """Whether the interval lies below the tolerance, or else above it; an interval across it decides nothing."""
    low, high = interval(runs, target)
    assert high < REACHED or low > REACHED, f"undecided: {low:.3f} to {high:.3f}"
    return high < REACHED


def random_problem(d: int, steps: int, seed: int) -> tuple[Steps, Quadratic, float]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(d, d + 2, generator=generator, dtype=torch.float64)
    reward = Quadratic(draw[:, :d] @ draw[:, :d].T, draw[:, d])
    return ancestral(draw[:, d + 1], 0.7 + seed, steps, 0.2), reward, 0.3 + 0.4 * seed


def gradient(function: Callable[[Steps], Tensor], at: Steps) -> Tensor:
    """Of a function of the matrices and shifts, flat."""
    leaves = at.matrices.clone().requires_grad_(), at.shifts.clone().requires_grad_()
    return torch.cat([g.flatten() for g in torch.autograd.grad(function(Steps(*leaves, at.deviations)), leaves)])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("d", [1, 2])
def test_the_closed_form_is_the_optimum(d: int, steps: int) -> None:
    """L-BFGS on the exact objective, from the base on, ends at the backward recursion's steps, to 1e-7 a number."""
    for seed in range(2):
        base, reward, alpha = random_problem(d, steps, seed)
        leaves = base.matrices.clone().requires_grad_(), base.shifts.clone().requires_grad_()
        lbfgs = torch.optim.LBFGS(
            leaves, max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
        )

        def loss(leaves=leaves, lbfgs=lbfgs, base=base, reward=reward, alpha=alpha) -> Tensor:
            lbfgs.zero_grad()
            value = -objective(Steps(leaves[0], leaves[1], base.deviations), base, reward, alpha)
            value.backward()
            return value

        lbfgs.step(loss)
        best = optimum(base, reward, alpha)
        assert (leaves[0] - best.matrices).abs().max() < 1e-7
        assert (leaves[1] - best.shifts).abs().max() < 1e-7


@pytest.mark.parametrize("d", [1, 2])
def test_the_resting_point_is_where_dpoks_expected_update_vanishes(d: int) -> None:
    """With the states' law held fixed in the KL, the gradient is 0 at `later_kl=False`; control: not at the optimum.

    There the true gradient vanishes, the states' law included. Of one step both are the same.
    """
    base, reward, alpha = random_problem(d, 3, 1)
    best, rest = optimum(base, reward, alpha), optimum(base, reward, alpha, later_kl=False)

    def update(at: Steps) -> Tensor:
        laws = marginals(at)

        def function(moved: Steps) -> Tensor:
            total = reward.expected(*marginals(moved)[-1])
            for k, (mean, covariance) in enumerate(laws[:-1]):
                a, b = moved.matrices[k] - base.matrices[k], moved.shifts[k] - base.shifts[k]
                energy = (a @ mean + b).square().sum() + (a @ covariance @ a.T).trace()
                total = total - alpha * energy / (2 * base.deviations[k] ** 2)
            return total

        return gradient(function, at)

    assert update(rest).abs().max() < 1e-12
    assert update(best).abs().max() > 1e-2
    assert gradient(lambda moved: objective(moved, base, reward, alpha), best).abs().max() < 1e-12
    alone = ancestral(base.shifts[0], 1.0, 1, 0.2)
    both = [optimum(alone, reward, alpha, later_kl=later) for later in (True, False)]
    assert torch.equal(both[0].matrices, both[1].matrices)
    assert torch.equal(both[0].shifts, both[1].shifts)


def test_the_table_of_the_docs_is_what_the_claim_computes(root: Path) -> None:
    """Every row of MATH.md 10, from the claim's general kernels; the closed form here agrees with the claim's."""
    text = (root / "docs" / "MATH.md").read_text()
    assert all(row in text for row in stepwise.table())
    base, reward, alpha = random_problem(2, 3, 1)
    zero, one = plane(0.0, 0.0), torch.eye(2, dtype=torch.float64)
    noises = base.deviations.square()[:, None, None] * one
    for later_kl in (True, False):
        ours = optimum(base, reward, alpha, later_kl=later_kl)
        quadratic = QuadraticReward(reward.curvature, reward.slope)
        chain = stepwise.Chain(zero, one, base.matrices, base.shifts, noises)
        theirs = stepwise.optimum(chain, quadratic, alpha, later_kl=later_kl)
        assert torch.allclose(ours.matrices, theirs.matrices, atol=1e-12)
        assert torch.allclose(ours.shifts, theirs.shifts, atol=1e-12)


def test_the_base_samples_its_prior() -> None:
    """From pure noise (a_0 = 0) every state has the law of the noised prior, and the last the prior's own."""
    mean, variance = plane(0.3, -1.0), 1.5
    a = torch.cos(torch.linspace(torch.pi / 2, 0, 6, dtype=torch.float64))
    for (m, covariance), level in zip(marginals(ancestral(mean, variance, 5, 0.0)), a, strict=True):
        assert torch.allclose(m, level * mean, atol=1e-7)
        assert torch.allclose(covariance, (1 + level**2 * (variance - 1)) * torch.eye(2, dtype=torch.float64))


def test_one_step_reaches_the_optimum(tmp_path: Path) -> None:
    """A single step learns the closed form; controls: it misses that of twice alpha and that of half."""
    runs = learn(tmp_path, 1, **BARE)
    assert reached(runs, optimum(base_of(1), REWARD, ALPHA))
    for other in (2 * ALPHA, ALPHA / 2):
        assert not reached(runs, optimum(base_of(1), REWARD, other))


def test_shuffled_rewards_leave_it_at_the_base(tmp_path: Path) -> None:
    """Control: where each image gets its neighbour's score, every run ends within the tolerance of the base."""

    class Shuffled(Quadratic):
        def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return super().score(images, prompts).roll(1)

    best = optimum(base_of(1), REWARD, ALPHA)
    runs = learn(tmp_path, 1, Shuffled(REWARD.curvature, REWARD.slope), **BARE)
    assert not reached(runs, best)
    assert all(path_kl(learned, base_of(1)) < REACHED**2 * path_kl(best, base_of(1)) for learned, _ in runs)


@pytest.mark.slow
@pytest.mark.parametrize("advantages", [PLAIN, AHEAD], ids=["return-minus-value", "look-ahead"])
def test_three_steps_come_to_rest_where_later_kl_is_not_counted(tmp_path: Path, advantages: dict[str, Any]) -> None:
    """Whichever the advantages, DPOK ends at its resting point; it misses its objective's optimum, and twice alpha's.

    The KL that it records is that of whole trajectories in nats, by the exact moments to 10 %: alpha is reward a nat.
    """
    base, runs = base_of(3), learn(tmp_path, 3, **advantages)
    assert reached(runs, optimum(base, REWARD, ALPHA, later_kl=False))
    assert not reached(runs, optimum(base, REWARD, ALPHA))
    assert not reached(runs, optimum(base, REWARD, 2 * ALPHA, later_kl=False))
    for learned, history in runs:
        recorded = np.mean([record["kl"] for record in history[-5:]])
        assert recorded == pytest.approx(float(path_kl(learned, base)), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("advantages", [PLAIN, AHEAD], ids=["return-minus-value", "look-ahead"])
def test_three_steps_reach_the_optimum_once_later_kl_is_counted(tmp_path: Path, advantages: dict[str, Any]) -> None:
    """With alpha times the KL to come taken off each advantage, it reaches its objective's optimum, mean and KL."""
    base, runs = base_of(3), learn(tmp_path, 3, **advantages, later_kl=True)
    best = optimum(base, REWARD, ALPHA)
    assert reached(runs, best)
    assert not reached(runs, optimum(base, REWARD, ALPHA, later_kl=False))
    for learned, _ in runs:
        assert float(path_kl(learned, base)) == pytest.approx(float(path_kl(best, base)), rel=0.1)
