"""The same computations with the libraries that one would use instead. JAX and torchsde are optional."""

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from dbtheory import GaussianMixture
from dbtheory.blend import weighted_sum
from dbtheory.experts import Experts
from dbtheory.preference import Amount


def autograd_score(mixture: GaussianMixture, piece: int) -> Callable[[Tensor], Tensor]:
    """Autograd through `MixtureSameFamily`, for `piece` points at once: their graph must fit in memory."""
    components = MultivariateNormal(mixture.means, mixture.covariances)
    law = MixtureSameFamily(Categorical(mixture.weights), components)

    def score(x: Tensor) -> Tensor:
        leaves = [part.detach().requires_grad_() for part in x.split(piece)]
        for leaf in leaves:
            law.log_prob(leaf).sum().backward()
        return torch.cat([leaf.grad for leaf in leaves if leaf.grad is not None])

    return score


def optional(module: str) -> Any:
    """A peer's module, which type checkers need not have. Raises ImportError where it is not installed."""
    return import_module(module)


def use_threads(count: int) -> None:
    """The same number for torch and, if it has not been imported yet, for JAX."""
    torch.set_num_threads(count)
    os.environ["NPROC"] = str(count)


def jax_scores(mixture: GaussianMixture, piece: int) -> dict[str, Callable[[Any], Any]]:
    """The score's formula, jitted in float64: as one writes it, and in our pieces with our order in memory.

    They take and return arrays of JAX, `(n, d)`. Raises ImportError without JAX.
    """
    jax, jnp = optional("jax"), optional("jax.numpy")
    jax.config.update("jax_enable_x64", True)
    parts = (mixture.log_weights, mixture.means, mixture.eigenvalues, mixture.eigenvectors)
    log_weights, means, values, vectors = (jnp.asarray(part.numpy()) for part in parts)
    log_peaks = log_weights - 0.5 * jnp.log(values).sum(-1)
    matrices = vectors * values[:, None] ** -0.5

    def plain(x):
        whitened = jnp.einsum("kij,nki->nkj", matrices, x[:, None] - means)
        shares = jax.nn.softmax(log_peaks - 0.5 * (whitened**2).sum(-1), axis=-1)
        return -jnp.einsum("kij,nkj->ni", matrices, shares[..., None] * whitened)

    def points_last(x):
        offsets = x.T - means[:, :, None]
        whitened = (matrices[..., None] * offsets[:, :, None]).sum(1)
        log_joint = log_peaks[:, None] - 0.5 * (whitened**2).sum(1)
        shares = jnp.exp(log_joint - log_joint.max(0))
        return -(jnp.einsum("kij,kjn->in", matrices, whitened * shares[:, None]) / shares.sum(0)).T

    def in_pieces(x):
        whole = len(x) // piece * piece
        pieces = x[:whole].reshape(-1, piece, x.shape[1])
        head = jax.lax.map(points_last, pieces).reshape(whole, x.shape[1])
        return jnp.concatenate([head, points_last(x[whole:])])

    return {"jax": jax.jit(plain), "jax, our pieces and order": jax.jit(in_pieces)}


def torchsde_sample(
    experts: Experts, coefficients: Mapping[str, Amount], x: Tensor, times: Tensor, bm: Any = None
) -> Tensor:
    """The blend's reverse-time SDE from `x` at `times[0]` to `times[-1]` by torchsde's Euler, equal steps.

    torchsde's clock runs forward: its time is `times[0] - t`. `bm` is a Brownian motion of torchsde, drawn by
    it if not given. Experts predict scores. Raises ImportError without torchsde.
    """
    torchsde = optional("torchsde")
    schedule, start = experts.schedule, times[0]

    class ReverseSDE(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def f(self, s: Tensor, y: Tensor) -> Tensor:
            t = start - s
            score = weighted_sum(experts, y, t, coefficients)
            return schedule.diffusion_squared(t) * score - schedule.drift_rate(t) * y

        def g(self, s: Tensor, y: Tensor) -> Tensor:
            return schedule.diffusion_squared(start - s).sqrt().expand_as(y)

    clock = start - times[[0, -1]]
    # a hair more, or rounding in torchsde's clock leaves a rest that costs it one more step
    step = float(clock[-1]) / (len(times) - 1) * (1 + 1e-12)
    with torch.no_grad():
        path = torchsde.sdeint(ReverseSDE(), x, clock, bm=bm, method="euler", dt=step)
    return path[-1]
