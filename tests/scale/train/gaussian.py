"""A diffusion whose steps are affine Gaussian: what DPOK should learn on it, and where it rests, in closed form.

States are in the plane, or on any `R^d`; step k is `N(A_k x + b_k, s_k^2 I)`, and x_T ~ N(0, I). The reward is
`-x'Qx/2 + c'x`, so that everything below stays quadratic (MATH.md 10).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from scale.train.policy import Condition, Rollout, log_probability


@dataclass(frozen=True)
class Steps:
    """Step k is `N(matrices[k] x + shifts[k], deviations[k]^2 I)`."""

    matrices: Float[Tensor, "steps d d"]
    shifts: Float[Tensor, "steps d"]
    deviations: Float[Tensor, " steps"]

    def __len__(self) -> int:
        return len(self.shifts)


@dataclass
class Quadratic:
    """The reward `-x'Qx/2 + c'x` of data, which are their own images."""

    curvature: Float[Tensor, "d d"]
    slope: Float[Tensor, " d"]
    name: str = "quadratic"

    def score(self, images: Float[Tensor, "n d"], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        q, c = self.curvature.to(images), self.slope.to(images)
        return images @ c - ((images @ q) * images).sum(1) / 2

    def expected(self, mean: Float[Tensor, " d"], covariance: Float[Tensor, "d d"]) -> Float[Tensor, ""]:
        """Its mean under a law with these moments."""
        return self.slope @ mean - mean @ self.curvature @ mean / 2 - (self.curvature @ covariance).trace() / 2


def ancestral(mean: Float[Tensor, " d"], variance: float, steps: int, first: float) -> Steps:
    """The exact kernels of `x_k = a_k x_0 + sqrt(1 - a_k^2) z`, x_0 ~ N(mean, variance I), a_0 = `first`, a_K = 1."""
    a = torch.cos(torch.linspace(torch.tensor(first).acos(), 0, steps + 1, dtype=torch.float64))
    spread = a**2 * variance + 1 - a**2
    ratio = a[:-1] / a[1:]
    gain = ratio * spread[1:] / spread[:-1]
    deviations = (spread[1:] * (1 - ratio * gain)).sqrt()
    return Steps(gain[:, None, None] * torch.eye(len(mean)), (a[1:] - gain * a[:-1])[:, None] * mean, deviations)


def optimum(base: Steps, reward: Quadratic, alpha: float, *, later_kl: bool = True) -> Steps:
    """The steps that maximise `E r(x_0) - alpha sum_k E KL(step k || base step k)` at the base's variances.

    Backwards from the reward: where the value after a step is `-y'Qy/2 + g'y`, the best mean is
    `(I + s^2 Q/alpha)^-1 (m + s^2 g/alpha)`, with m the base's. The value before it counts the KL of later steps;
    `later_kl=False` leaves it out, so that each step weighs its own KL against the reward alone: there DPOK's updates
    come to rest, whose gradient of the KL drops the law of the states.
    """
    curvature, slope, chain = reward.curvature, reward.slope, []
    for a, b, s in reversed(list(zip(base.matrices, base.shifts, base.deviations, strict=True))):
        shrink = torch.linalg.inv(torch.eye(len(b), dtype=b.dtype) + s**2 / alpha * curvature)
        matrix, shift = shrink @ a, shrink @ (b + s**2 / alpha * slope)
        chain.append((matrix, shift))
        if later_kl:
            slope, curvature = matrix.T @ (slope - curvature @ b), a.T @ curvature @ matrix
        else:
            slope, curvature = matrix.T @ (slope - curvature @ shift), matrix.T @ curvature @ matrix
    matrices, shifts = zip(*reversed(chain), strict=True)
    return Steps(torch.stack(matrices), torch.stack(shifts), base.deviations)


def marginals(steps: Steps) -> list[tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]]:
    """Mean and covariance of every state, from N(0, I) to the data's."""
    mean, covariance = torch.zeros_like(steps.shifts[0]), torch.eye(steps.shifts.shape[1], dtype=steps.shifts.dtype)
    laws = [(mean, covariance)]
    for a, b, s in zip(steps.matrices, steps.shifts, steps.deviations, strict=True):
        mean, covariance = a @ mean + b, a @ covariance @ a.T + s**2 * torch.eye(len(b), dtype=b.dtype)
        laws.append((mean, covariance))
    return laws


def path_kl(steps: Steps, base: Steps) -> Float[Tensor, ""]:
    """`sum_k E KL(step k || base step k)` in nats, the states those of `steps`."""
    total = torch.zeros((), dtype=steps.shifts.dtype)
    for k, (mean, covariance) in enumerate(marginals(steps)[:-1]):
        a, b = steps.matrices[k] - base.matrices[k], steps.shifts[k] - base.shifts[k]
        total = total + ((a @ mean + b).square().sum() + (a @ covariance @ a.T).trace()) / (2 * base.deviations[k] ** 2)
    return total


def objective(steps: Steps, base: Steps, reward: Quadratic, alpha: float) -> Float[Tensor, ""]:
    """`E r(x_0) - alpha sum_k E KL(step k || base step k)`, by its exact moments."""
    return reward.expected(*marginals(steps)[-1]) - alpha * path_kl(steps, base)


class GaussianPolicy:
    """Affine Gaussian steps as a trainer's policy, whose matrices and shifts are learned from the base's on."""

    device = torch.device("cpu")

    def __init__(self, base: Steps) -> None:
        self.start, self.learning = base, True
        self.matrices = torch.nn.Parameter(base.matrices.float())
        self.shifts = torch.nn.Parameter(base.shifts.float())

    @property
    def steps(self) -> int:
        return len(self.start)

    @property
    def learned(self) -> Steps:
        """The steps as they are now."""
        return Steps(self.matrices.detach().double(), self.shifts.detach().double(), self.start.deviations)

    def trainable(self) -> Mapping[str, torch.nn.Parameter]:
        return {"matrices": self.matrices, "shifts": self.shifts}

    def moments(
        self, x: Float[Tensor, "n d"], k: Int64[Tensor, " n"], condition: Condition
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n 1"]]:
        matrices, shifts = self.matrices, self.shifts
        if not self.learning:
            matrices, shifts = self.start.matrices.to(x), self.start.shifts.to(x)
        return torch.einsum("nij,nj->ni", matrices[k], x) + shifts[k], self.start.deviations.to(x)[k, None]

    @contextmanager
    def base(self) -> Iterator[None]:
        self.learning = False
        try:
            yield
        finally:
            self.learning = True

    @torch.no_grad()
    def rollout(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> Rollout:
        shape = self.steps + 1, self.shifts.shape[1]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators], 1)
        condition = {"one": torch.ones(len(prompts), 1)}
        states, guesses, log_probabilities = [noise[0]], [], []
        for step in range(self.steps):
            mean, std = self.moments(states[-1], torch.full((len(prompts),), step), condition)
            guesses.append(self._guess(states[-1], step))
            states.append(mean + std * noise[step + 1])
            log_probabilities.append(log_probability(states[-1], mean, std))
        stacked = torch.stack(states), torch.stack(guesses), torch.stack(log_probabilities)
        return Rollout(list(prompts), condition, *stacked, states[-1])

    def _guess(self, x: Float[Tensor, "n d"], step: int) -> Float[Tensor, "n d"]:
        """`E[x_0 | x]` under the steps as they are now."""
        for matrix, shift in zip(self.matrices[step:], self.shifts[step:], strict=True):
            x = x @ matrix.T + shift
        return x

    def decode(self, data: Tensor) -> Tensor:
        return data

    def features(self, condition: Condition) -> Float[Tensor, "n 1"]:
        return condition["one"]
