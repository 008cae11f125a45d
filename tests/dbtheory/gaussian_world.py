"""A world where everything stays Gaussian: the weighted law of a sampler's output, without Monte Carlo."""

from itertools import pairwise

import torch

from dbtheory import ExactExperts, GaussianMixture, QuadraticReward, VPLinear
from dbtheory.correct import ancestral_rate, euler_rate
from dbtheory.steps import step_variance

EYE = torch.eye(2, dtype=torch.float64)
SCHEDULE = VPLinear()
REWARDS = {
    "round": QuadraticReward(0.8 * EYE, torch.tensor([1.0, -0.5], dtype=torch.float64)),
    "long": QuadraticReward(
        torch.tensor([[-0.1, 0.1], [0.1, 1.5]], dtype=torch.float64), torch.tensor([-0.5, 0.0], dtype=torch.float64)
    ),
}


def world(kind="score", rewards=REWARDS, schedule=SCHEDULE):
    """A Gaussian prior, so that every target, and every weighted law of a sampler, is Gaussian too."""
    mean = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    covariance = torch.tensor([[[0.8, 0.3], [0.3, 0.6]]], dtype=torch.float64)
    return ExactExperts(
        GaussianMixture(torch.ones(1, dtype=torch.float64), mean, covariance), rewards, 0.7, schedule, kind
    )


def gaussian(experts, name, t):
    """Mean and precision of one expert's law at time t."""
    law, alpha = experts.targets[name], experts.schedule.alpha(t)
    covariance = alpha**2 * law.covariances[0] + experts.schedule.variance(t) * EYE
    return alpha * law.means[0], torch.linalg.inv(covariance)


class Weighted:
    """`exp(log_mass) N(mean, covariance)`, under products with quadratic exponentials and affine noisy maps."""

    def __init__(self, log_mass, mean, covariance):
        self.log_mass, self.mean, self.covariance = log_mass, mean, covariance

    def times(self, matrix, vector, constant):
        """Times `exp(-1/2 x'matrix x + vector'x + constant)`."""
        before, old = torch.linalg.inv(self.covariance), self.mean
        after = before + matrix
        self.mean = torch.linalg.solve(after, before @ old + vector)
        self.log_mass = (
            self.log_mass + constant - 0.5 * old @ before @ old + 0.5 * self.mean @ after @ self.mean
            + 0.5 * (before.logdet() - after.logdet())
        )  # fmt: skip
        self.covariance = torch.linalg.inv(after)

    def moved(self, matrix, shift, variance):
        self.mean = matrix @ self.mean + shift
        self.covariance = matrix @ self.covariance @ matrix.T + variance * EYE

    @property
    def numbers(self):
        return torch.cat([self.log_mass.reshape(1), self.mean, self.covariance.flatten()])


def product(experts, c, t):
    """`prod_i p_{i,t}^{c_i}`, exactly."""
    parts = [(c_i, *gaussian(experts, name, t)) for name, c_i in c.items() if c_i]
    precision = sum(c_i * p for c_i, _, p in parts)
    covariance = torch.linalg.inv(precision)
    mean = covariance @ sum(c_i * p @ m for c_i, m, p in parts)
    constant = sum(c_i * (0.5 * p.logdet() - 0.5 * m @ p @ m) for c_i, m, p in parts)
    return Weighted(constant + 0.5 * mean @ precision @ mean - 0.5 * precision.logdet(), mean, covariance)


def weighted_chain(experts, c, grid, method, eta, form, sign=-1.0, start=None):
    """The weighted law of the sampler's output, by recursion: its map is affine and its weights are quadratic."""
    law = product(experts, c, grid[0]) if start is None else start
    schedule = experts.schedule
    for t, s in pairwise(grid):
        parts = [(c_i, *gaussian(experts, name, t)) for name, c_i in c.items() if c_i]
        slope, bias = -sum(c_i * p for c_i, _, p in parts), sum(c_i * p @ m for c_i, m, p in parts)
        rate = ancestral_rate(schedule, t, s) if form == "discrete" else euler_rate(schedule, t, s)
        law.times(
            -sign * rate * (sum(c_i * p @ p for c_i, _, p in parts) - slope @ slope),
            -sign * rate * (sum(c_i * p @ p @ m for c_i, m, p in parts) + slope @ bias),
            0.5 * sign * rate * (sum(c_i * (p @ m) @ (p @ m) for c_i, m, p in parts) - bias @ bias),
        )
        a_t, s_t, a_s, s_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
        variance = step_variance(method, schedule, t, s, eta)
        if method == "euler":
            f, g2, h = schedule.drift_rate(t), schedule.diffusion_squared(t), t - s
            law.moved((1 - f * h) * EYE + g2 * h * slope, g2 * h * bias, variance)
        else:
            ratio = (s_s**2 - variance).sqrt() / s_t
            gain = (a_s - ratio * a_t) / a_t
            law.moved((ratio + gain) * EYE + gain * s_t**2 * slope, gain * s_t**2 * bias, variance)
    return law
