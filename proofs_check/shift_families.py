"""Where `R | x_t` is a shift family, `R = k(x_t) + noise` with noise independent of x_t, the Jensen gap is zero, and so
are the density lemma's bound and, for Gaussian noise, the pathwise lemma's.

The paper draws this from its Lemma 2 with `grad_x log p_R + d_r log p_R = 0`, which such a family meets only where
`grad k = 1`; with `D = grad_x log p_R + d_r log p_R grad k` it follows for every k.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dbtheory import GaussianMixture, LinearReward, VPLinear, control, jensen_gap
from dbtheory.bounds import density_lemma, pathwise_lemma
from proofs_check.claim import Row
from proofs_check.problems import random_problems

SOURCE = "paper Lemma 2, Remark 4; MATH.md 5"
SCHEDULE = VPLinear()
Density = Callable[[Tensor], Tensor]  # log density of the noise, up to a constant
NOISES: dict[str, Density] = {
    "logistic": lambda e: -e / 0.3 - 2 * torch.nn.functional.softplus(-e / 0.3),
    "Gumbel": lambda e: -e / 0.4 - (-e / 0.4).exp(),
    "two-peaked": lambda e: torch.logaddexp(-2 * (e + 1).square(), -8 * (e - 1).square()),
}


def check() -> Iterator[Row]:
    yield from _linear_rewards()
    yield from _gaussian_along_the_reward()
    yield from _other_noises()


def _linear_rewards() -> Iterator[Row]:
    """A Gaussian prior and a linear reward: `k(x) = b' E[x_0|x]/alpha`, Gaussian noise."""
    gaps, densities, paths = [], [], []
    for problem in random_problems(40, tuple(range(1, 9)), 7, components=1, rewards=1):
        reward = LinearReward(problem.rewards[0].b)
        given = problem.arguments(reward)
        size = control(*given).norm(dim=-1)
        gaps.append(jensen_gap(*given).norm(dim=-1) / size)
        densities.append(density_lemma(*given).size_D / size)
        paths.append(pathwise_lemma(*given).L1 / size)
    what = "linear rewards under Gaussian priors in 1 to 8 dimensions"
    yield Row(f"largest |gap|/|u|, {what}", float(torch.cat(gaps).max()), 1e-10)
    yield Row(f"largest sqrt(E|D|^2)/|u|, {what}", float(torch.cat(densities).max()), 1e-10)
    yield Row(f"largest pathwise L1/|u|, {what}", float(torch.cat(paths).max()), 1e-10)


def _gaussian_along_the_reward() -> Iterator[Row]:
    """Three components in the plane that differ across the reward's direction only: the prior is not Gaussian."""
    means = torch.tensor([[0.4, -2.0], [0.4, 0.5], [0.4, 3.0]]).double()
    covariances = torch.diag_embed(torch.tensor([[0.8, 0.2], [0.8, 1.0], [0.8, 0.4]]).double())
    prior = GaussianMixture(torch.tensor([0.5, 0.2, 0.3]).double(), means, covariances)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(8), dtype=torch.float64)

    def largest(direction: list[float]) -> tuple[float, float]:
        given = (prior, LinearReward(torch.tensor(direction).double()), 0.5, SCHEDULE, x, 0.4)
        size = control(*given).norm(dim=-1)
        gap, D = jensen_gap(*given).norm(dim=-1), density_lemma(*given).size_D
        return float((gap / size).max()), float((D / size).max())

    (along, D_along), (across, D_across) = largest([2.0, 0.0]), largest([0.0, 2.0])
    yield Row("largest |gap|/|u|, a mixture that is Gaussian along the reward", along, 1e-10)
    yield Row("largest sqrt(E|D|^2)/|u|, a mixture that is Gaussian along the reward", D_along, 1e-10)
    what = "a mixture that is Gaussian only across the reward"
    yield Row(f"negative control: largest |gap|/|u|, {what}", across, 0.1, ">=")
    yield Row(f"negative control: largest sqrt(E|D|^2)/|u|, {what}", D_across, 0.1, ">=")


def _other_noises() -> Iterator[Row]:
    """`R = sin(2 x) + noise`, as of a noisy reward model: by a lattice in r and autograd in x, no formula of ours."""
    for name, noise in NOISES.items():
        gap, D, printed = _measures(lambda r, x, q=noise: q(r - (2 * x).sin()))
        family = f"R = sin(2x) + {name} noise"
        yield Row(f"largest |gap|, {family}", gap, 1e-10)
        yield Row(f"largest sqrt(E|D|^2), {family}", D, 1e-10)
        yield Row(
            f"L3 = 0 under {family}: yet the root mean square of d_x log p_R + d_r log p_R reaches",
            printed,
            1.0,
            ">=",
            refutes=True,
        )
    gap, D, _ = _measures(lambda r, x: NOISES["logistic"](r / (1 + 0.2 * x.sin())))
    yield Row("negative control: largest |gap| where x widens logistic noise", gap, 0.01, ">=")
    yield Row("negative control: largest sqrt(E|D|^2) where x widens logistic noise", D, 0.01, ">=")


def _measures(log_density: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float, float]:
    """The largest |gap|, `sqrt(E|D|^2)`, and the same with the printed sum in place of D, over x in [-2, 2]."""
    lattice, points = (torch.linspace(-end, end, count, dtype=torch.float64) for end, count in ((30, 20001), (2, 9)))
    r, x = torch.meshgrid(lattice, points, indexing="ij")
    r, x = r.clone().requires_grad_(True), x.clone().requires_grad_(True)
    values = log_density(r, x)
    score_x, score_r = torch.autograd.grad(values.sum(), (x, r))
    p = values.detach().softmax(0)
    r, score_x = r.detach(), score_x - (p * score_x).sum(0)  # less the normaliser's part
    jensen = (p * r * score_x).sum(0)
    tilted = (values.detach() + r).softmax(0)
    gap = ((tilted - p * r) * score_x).sum(0)
    sizes = [(p * total.square()).sum(0).sqrt() for total in (score_x + score_r * jensen, score_x + score_r)]
    return float(gap.abs().max()), float(sizes[0].max()), float(sizes[1].max())
