"""The generating function of a quadratic reward's law, against sums over a lattice."""

import pytest
import torch

from dbtheory.quadratic_cumulants import QuadraticCumulants
from dbtheory.schedule import VPLinear
from dbtheory.tilt import tilt
from tests.dbtheory.bayes import lattice, log_posterior
from tests.dbtheory.strategies import normal, random_mixture, random_reward

SCHEDULE, T = VPLinear(), 0.3


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dim", [1, 2])
def test_everything_equals_bayes_rule(dim: int) -> None:
    """K and K' at p = -0.4, 0, 1, the variance, the component means and `E[e^(zR)]` at complex z, one point at a time
    and in pieces."""
    prior, reward, x = (
        random_mixture(3, dim, seeded(dim)),
        random_reward(dim, 1.0, seeded(2)),
        normal((2, dim), seeded(3)),
    )
    posterior = prior.posterior(SCHEDULE, x, T)
    law = QuadraticCumulants.of(posterior, reward)
    z = torch.tensor([0.3 + 0.4j, -0.2 + 0.6j, 0.5j], dtype=torch.complex128)
    on_arc = law.generating_function(z.expand(2, -1))
    pieces = torch.cat([piece.generating_function(z[None]) for piece in law.split(1)])
    for i in range(2):
        alone = prior.posterior(SCHEDULE, x[i : i + 1], T)
        # e^(pR) widens the posterior: the lattice has to hold its tilts as well
        nodes = lattice([alone, *(tilt(alone, p * reward, 1) for p in (-0.4, 1.0))], spacing=0.3)
        log_weights = log_posterior(prior, SCHEDULE, x[i], T, nodes)
        weights, R = log_weights.exp(), reward(nodes)
        excess = R - reward(posterior.mean[i : i + 1])
        for p in (-0.4, 0.0, 1.0):
            value, rate = law.at(p)
            expected = (log_weights + p * excess).logsumexp(0)
            torch.testing.assert_close(value[i], expected, rtol=1e-9, atol=1e-11)
            tilted = (log_weights + p * excess).softmax(0)
            torch.testing.assert_close(rate[i], tilted @ excess, rtol=1e-9, atol=1e-11)
        centred = R - weights @ R
        torch.testing.assert_close(law.variance()[i], weights @ centred.square(), rtol=1e-9, atol=1e-11)
        shares = posterior.weights[i]
        assert float(shares @ law.component_means()[i]) == pytest.approx(0, abs=1e-12)
        exact = (weights * torch.exp(z.unsqueeze(-1) * centred)).sum(-1)
        # up to one positive factor at each z
        for got in (on_arc[i], pieces[i]):
            ratio = got / exact
            torch.testing.assert_close(ratio.imag / ratio.real, torch.zeros(3).double(), rtol=0, atol=1e-9)
            assert bool((ratio.real > 0).all())
