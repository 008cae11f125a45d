"""Where to lay the grid of a tilted mixture, and how fine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dbtheory.grid import GridLaw
from dbtheory.mixture import GaussianMixture

_DEVIATIONS = 9.0  # of every component of the prior, on each side
_EDGE = -35.0  # log density on the border, relative to the mode: e^-35 = 6e-16
_GROWTHS = 24  # of half a width each, which makes windows up to 17,000 times as wide
_COARSE = 129
_MOST = {1: 2049, 2: 257}  # nodes along an axis
_WANTED, _TOLERATED = 1e-4, 0.1  # discretisation errors: refine above the first, refuse above the second


def fitted_grid(prior: GaussianMixture, log_density: Callable[[Tensor], Tensor]) -> GridLaw:
    """The law of `log_density` (m, d) -> (m,), unnormalised, on a window that holds the prior's mass and its own.

    The window spans 9 standard deviations around every component of the prior, where experts are asked for
    scores, and grows until the density has fallen to e^-35 of its maximum on every side. The spacing starts at a
    third of the prior's smallest standard deviation and halves until the discretisation error is below 1e-4, at
    most 2049 nodes on a line and 257 x 257 on a plane.

    Raises ValueError where the mass leaves every window, and for a discretisation error above 0.1 at the end.
    """
    low, high = _window(prior, log_density)
    counts = ((high - low) / (prior.eigenvalues.min().sqrt() / 3)).ceil().clamp(_COARSE, _MOST[prior.dim]).long()
    while True:
        law = GridLaw.from_density(log_density, low.tolist(), high.tolist(), (counts | 1).tolist())
        if law.discretisation_error <= _WANTED or int(counts.min()) >= _MOST[prior.dim]:
            break
        counts = (2 * counts).clamp(max=_MOST[prior.dim])
    if law.discretisation_error > _TOLERATED:
        raise ValueError(
            f"a grid of {counts.tolist()} nodes does not resolve the target: discretisation error "
            f"{law.discretisation_error:.2g}; raise alpha, or use GridLaw.from_density on a window of its own"
        )
    return law


def _window(prior: GaussianMixture, log_density: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    reach = _DEVIATIONS * prior.covariances.diagonal(dim1=-2, dim2=-1).sqrt()
    low, high = (prior.means - reach).amin(0), (prior.means + reach).amax(0)
    for _ in range(_GROWTHS):
        axes = [torch.linspace(float(a), float(b), _COARSE).to(low) for a, b in zip(low, high, strict=True)]
        values = log_density(torch.cartesian_prod(*axes).reshape(-1, prior.dim)).reshape([_COARSE] * prior.dim)
        edge = float(values.max()) + _EDGE
        ends = [values.movedim(axis, 0)[[0, -1]].reshape(2, -1).amax(1) for axis in range(prior.dim)]
        open_low, open_high = (torch.stack(ends) > edge).unbind(1)
        if not bool((open_low | open_high).any()):
            return low, high
        half = 0.5 * (high - low)
        low, high = low - half * open_low, high + half * open_high
    raise ValueError(
        f"the tilt's mass leaves every window, the last from {low.tolist()} to {high.tolist()}: either it does not "
        "exist, or its tails are very heavy; raise alpha or use a reward that grows more slowly"
    )
