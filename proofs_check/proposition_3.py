"""For any independent noise Z, Gaussian or not: if `Y` has the tilted density `C p(y) e^{r(y)/alpha}`, then `Y + Z` has
density `C p_{X+Z}(x) E[e^{r(X)/alpha} | X + Z = x]` and score `grad log p_{X+Z} + grad log E[e^{r(X)/alpha} | X + Z]`.

In 1-D with Laplace, uniform, Student-t and two-peaked noise, which no diffusion makes: the left sides integrate the
tilted law and its slope over the noise; the right sides integrate the prior alone over X given X + Z, and are
differentiated by finite differences. In up to three dimensions, with noise that is a Gaussian mixture, both sides are
closed. Errors of densities are relative to the largest density, of scores to the largest score of the points.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy import stats
from scipy.special import roots_legendre
from torch import Tensor

from dbtheory import GaussianMixture, TanhReward, tilt
from dbtheory.reward import QuadraticReward, Reward
from dbtheory.tilt import log_normalizer
from proofs_check.claim import Row
from proofs_check.problems import random_problems

SOURCE = "paper Proposition 3; MATH.md 3"
ALPHA = 0.7
STEP = 2e-3  # of the five-point difference: its error is of order STEP^4
POINTS = (-2.5, -0.4, 0.7, 2.0)
REACH = 16.0  # the prior's mass lies within


@dataclass(frozen=True)
class Noise:
    """A density on the line, and the points where it is not smooth."""

    density: Callable[[np.ndarray], np.ndarray]
    kinks: tuple[float, ...] = ()


NOISES = {
    "Laplace noise": Noise(partial(stats.laplace.pdf, scale=0.6), (0.0,)),
    "uniform noise": Noise(lambda z: 0.5 * (np.abs(z) < 1), (-1.0, 1.0)),
    "Student-t noise (3 degrees of freedom)": Noise(partial(stats.t.pdf, df=3, scale=0.5)),
    "two-peaked noise": Noise(lambda z: 0.5 * (stats.norm.pdf(z, -1, 0.3) + stats.norm.pdf(z, 1, 0.3))),
}


def check() -> Iterator[Row]:
    prior = GaussianMixture(
        _tensor([0.5, 0.3, 0.2]), _tensor([[-2.0], [0.5], [2.5]]), _tensor([[[0.4]], [[0.9]], [[0.3]]])
    )
    quadratic = QuadraticReward(_tensor([[0.8]]), _tensor([0.5]))
    tanh = TanhReward(_tensor([[1.5], [-0.7]]), _tensor([0.3, 0.5]), _tensor([1.0, 0.8]))
    for name, noise in NOISES.items():
        density, score = _errors(prior, quadratic, noise, noise)
        yield Row(f"{name}, quadratic reward: density with its constant C = 1/Z", density, 1e-10)
        yield Row(f"{name}, quadratic reward: score", score, 1e-8)
        yield Row(f"{name}, tanh reward: score", _errors(prior, tanh, noise, noise)[1], 1e-8)
    yield Row("Gaussian-mixture noise in 1 to 3 dimensions, 30 problems: score", _mixture_error(), 1e-10)
    wider = Noise(partial(stats.laplace.pdf, scale=0.66), (0.0,))
    density, score = _errors(prior, quadratic, NOISES["Laplace noise"], wider)
    yield Row("negative control: Y with noise one tenth wider than X's, density", density, 1e-3, ">=")
    yield Row("negative control: Y with noise one tenth wider than X's, score", score, 1e-3, ">=")


def _errors(prior: GaussianMixture, reward: Reward, noise: Noise, noise_of_y: Noise) -> tuple[float, float]:
    """Errors of density and score over the points, relative to the largest density and score."""
    log_z = float(log_normalizer(prior, reward, ALPHA)) if isinstance(reward, QuadraticReward) else 0.0
    left = np.array([_noised_target(prior, reward, noise_of_y, x) for x in POINTS])
    right = np.array([_base_times_expectation(prior, reward, noise, x) for x in POINTS])
    right[:, 0] *= np.exp(-log_z)
    density, score = np.abs(left - right).max(0) / np.abs(left).max(0)
    return float(density), float(score)


def _noised_target(prior: GaussianMixture, reward: Reward, noise: Noise, x: float) -> tuple[float, float]:
    """Density and score of Y + Z at x: `int q(x - z) psi(z) dz`, and the same with q' over it.

    q is the closed form where the reward is quadratic, and unnormalised otherwise.
    """
    z, weights = _rule(x - REACH, x + REACH, noise.kinks)
    y = _tensor(x - z).unsqueeze(-1).requires_grad_(True)
    if isinstance(reward, QuadraticReward):
        log_q = tilt(prior, reward, ALPHA).log_prob(y)
    else:
        log_q = prior.log_prob(y) + reward(y) / ALPHA
    (slope,) = torch.autograd.grad(log_q.sum(), y)
    mass = weights * noise.density(z) * log_q.detach().exp().numpy()
    return mass.sum(), mass @ slope[:, 0].numpy() / mass.sum()


def _base_times_expectation(prior: GaussianMixture, reward: Reward, noise: Noise, x: float) -> tuple[float, float]:
    """`p(x) E[e^R | x]`, and the derivative of its log: both terms of the score, by five-point differences."""
    base, expectation = _base_and_expectation(prior, reward, noise, x)
    around = [np.log(_base_and_expectation(prior, reward, noise, x + k * STEP)) for k in (-2, -1, 1, 2)]
    of_base, of_expectation = np.array([1, -8, 8, -1]) @ np.array(around) / (12 * STEP)
    return base * expectation, of_base + of_expectation


def _base_and_expectation(prior: GaussianMixture, reward: Reward, noise: Noise, x: float) -> tuple[float, float]:
    """The density of X + Z at x, and `E[e^{r(X)/alpha} | X + Z = x]` by Bayes' rule, integrated over X."""
    y, weights = _rule(-REACH, REACH, tuple(x - kink for kink in noise.kinks))
    points = _tensor(y).unsqueeze(-1)
    joint = weights * noise.density(x - y) * prior.log_prob(points).exp().numpy()
    return joint.sum(), joint @ (reward(points) / ALPHA).exp().numpy() / joint.sum()


def _rule(low: float, high: float, kinks: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre of order 30 on panels of about a half, which end at the kinks."""
    nodes, weights = roots_legendre(30)
    ends = np.union1d(np.linspace(low, high, 65), kinks)
    middles, halves = (ends[1:] + ends[:-1]) / 2, (ends[1:] - ends[:-1]) / 2
    return (middles[:, None] + halves[:, None] * nodes).ravel(), (halves[:, None] * weights).ravel()


def _mixture_error() -> float:
    """`|score_{Y+Z} - score_{X+Z} - grad log E[e^R | X + Z]|` relative to the largest of the three at a point."""
    worst = 0.0
    for dim in (1, 2, 3):
        problems = list(random_problems(10, (dim,), seed=5 + dim, rewards=1))
        # each problem's noise has the law of the next one's prior
        for p, other in zip(problems, problems[1:] + problems[:1], strict=True):
            target, noise = tilt(p.prior, p.combined, p.alpha), other.prior
            x = p.x.clone().requires_grad_(True)
            (u,) = torch.autograd.grad(log_normalizer(_given_sum(p.prior, noise, x), p.combined, p.alpha).sum(), x)
            terms = _sum(target, noise).score(p.x), _sum(p.prior, noise).score(p.x), u
            largest = torch.stack([term.norm(dim=-1) for term in terms]).amax(0)
            worst = max(worst, float(((terms[0] - terms[1] - terms[2]).norm(dim=-1) / largest).max()))
    return worst


def _sum(first: GaussianMixture, second: GaussianMixture) -> GaussianMixture:
    """The law of the sum of two independent mixtures: every pair of components."""
    weights = first.weights.unsqueeze(-1) * second.weights
    means = first.means.unsqueeze(1) + second.means
    covariances = first.covariances.unsqueeze(1) + second.covariances
    return GaussianMixture(weights.flatten(), means.flatten(0, 1), covariances.flatten(0, 1))


def _given_sum(prior: GaussianMixture, noise: GaussianMixture, x: Tensor) -> GaussianMixture:
    """The law of X given X + Z = x, one mixture for each row: the Gaussian conditional of every pair."""
    both = _sum(prior, noise)
    means = prior.means.repeat_interleave(len(noise.means), 0)
    covariances = prior.covariances.repeat_interleave(len(noise.means), 0)
    gain = covariances @ torch.linalg.inv(both.covariances)
    eigenvalues, eigenvectors = torch.linalg.eigh(covariances - gain @ covariances)
    moved = torch.einsum("kij,nkj->nki", gain, x.unsqueeze(-2) - both.means)
    return GaussianMixture.from_eigen(both.joint_log_prob(x), means + moved, eigenvalues, eigenvectors)


def _tensor(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)
