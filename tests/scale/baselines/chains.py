"""An affine Gaussian diffusion as the baselines' chain, and guided chains on it in closed form."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from scale.train.policy import Condition
from tests.scale.train.gaussian import Quadratic, Steps


class AffineChain:
    """Steps `N(A_k x + b_k, s_k^2 I)`; the guess of the data runs the remaining means (exact, as they are affine)."""

    def __init__(self, affine: Steps) -> None:
        self.affine, self.rows = affine, []

    @property
    def steps(self) -> int:
        return len(self.affine)

    def encode(self, prompts: Sequence[str]) -> Condition:
        return {"row": torch.arange(len(prompts))}

    def draw(self, generators: Sequence[torch.Generator]) -> Float[Tensor, "n d"]:
        size = self.affine.shifts.shape[1]
        return torch.stack([torch.randn(size, generator=generator, dtype=torch.float64) for generator in generators])

    def step(
        self, x: Float[Tensor, "n d"], k: Int64[Tensor, " n"], condition: Condition
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n 1"], Float[Tensor, "n d"]]:
        self.rows.append(len(x))
        assert len(condition["row"]) == len(x)
        first = int(k[0])
        mean = clean = self._mean(x, first)
        for later in range(first + 1, self.steps):
            clean = self._mean(clean, later)
        return mean, self.affine.deviations[k, None], clean

    def _mean(self, x: Tensor, k: int) -> Tensor:
        return x @ self.affine.matrices[k].T + self.affine.shifts[k]

    def decode(self, data: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return data


def tweedie(mean: Tensor, variance: float, a: Tensor) -> tuple[Tensor, Tensor]:
    """`E[x_0 | x] = gain x + shift` at `x = a x_0 + sqrt(1 - a^2) z`, x_0 ~ N(mean, variance I)."""
    gain = a * variance / (a**2 * variance + 1 - a**2)
    return gain, (1 - gain * a) * mean


def guided(base: Steps, reward: Quadratic, guesses: Sequence[tuple[Tensor, Tensor]], scales: Sequence[float]) -> Steps:
    """RGG in closed form (paper eq. 12), for guesses `gain_k x + shift_k`: with `G = gain_k`, `e = shift_k`,

    `A_k - scale s^2 G^2 Q` and `b_k + scale s^2 G (c - Q e)`, since the gradient of `-y'Qy/2 + c'y` is `c - Qy`.
    """
    matrices, shifts = [], []
    for (gain, shift), scale, a, b, s in zip(
        guesses, scales, base.matrices, base.shifts, base.deviations, strict=True
    ):  # fmt: skip
        matrices.append(a - scale * s**2 * gain**2 * reward.curvature)
        shifts.append(b + scale * s**2 * gain * (reward.slope - reward.curvature @ shift))
    return Steps(torch.stack(matrices), torch.stack(shifts), base.deviations)
