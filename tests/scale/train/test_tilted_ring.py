"""Reward-weighted denoising against closed forms: a Gaussian, the effective sample size, and the ring of six."""

from collections.abc import Callable
from math import exp

import pytest
import torch
from scipy import stats
from torch import Tensor

from dbtheory import tilt
from dbtheory.law import Law
from dbtheory.schedule import expand_like
from scale.train.tilted import control_variate, effective_sizes, log_normalizers, tilted_weights, weighted_loss
from tests.chance import alarms
from toys import registry
from toys.network import ScoreNetwork


def fitted_line(x: Tensor, noise: Tensor, weights: Tensor, base: Tensor, promise: Tensor) -> tuple[Tensor, Tensor]:
    """Minimiser (2,) of the corrected loss over lines in x, and its covariance (the sandwich estimate)."""
    features = torch.stack((torch.ones_like(x), x), 1)

    def loss(line: Tensor) -> Tensor:
        eps = (features @ line).unsqueeze(1)
        extra = control_variate(eps, base.unsqueeze(1), noise.unsqueeze(1), promise)
        return weighted_loss(eps, noise.unsqueeze(1), weights) + extra

    start = torch.zeros(2, dtype=x.dtype)
    gradient, hessian = torch.func.grad(loss)(start), torch.func.hessian(loss)(start)
    line = start - torch.linalg.solve(hessian, gradient)  # one Newton step, exact for a quadratic
    each = 2 * (weights * (features @ line - noise) + promise * (noise - base)).unsqueeze(1) * features
    inverse = torch.linalg.inv(hessian)
    return line, inverse @ (each.mT @ each / len(x)) @ inverse / len(x)


ALPHA, B, Q, DRAWS = 0.8, 0.9, 0.4, 100_000


def reward_of(x0: Tensor) -> Tensor:
    return B * x0 - Q * x0**2 / 2


def fit_against_truth(
    sign: float = 1.0, bias: float = 0.0, corrected: bool = True, looks: tuple[float, ...] = (0.98, 0.7, 0.3)
) -> tuple[list[float], Tensor]:
    """p-values of the fitted lines at three noise levels against the tilted Gaussian's, and the lines' variances.

    The tilted law is N(m, v), 1 / v = 1 + Q / alpha, m = v B / alpha; the base is off by `bias`.
    """
    v = 1 / (1 + Q / ALPHA)
    m = v * B / ALPHA
    generator, p_values, variances = torch.Generator().manual_seed(0), [], []
    for a in looks:
        s = (1 - a**2) ** 0.5
        x0, noise = (torch.randn(DRAWS, generator=generator, dtype=torch.float64) for _ in range(2))
        rewards, x = sign * reward_of(x0), a * x0 + s * noise
        base = s * x + bias  # of N(0, 1), whose noised law is itself
        (normalizer,) = log_normalizers(rewards, DRAWS, ALPHA)
        promise = (sign * reward_of((x - s * base) / a) / ALPHA - normalizer).exp() * corrected
        line, covariance = fitted_line(x, noise, tilted_weights(rewards, DRAWS, ALPHA), base, promise)
        slope = s / (a**2 * v + s**2)
        off = line - torch.tensor([-slope * a * m, slope], dtype=torch.float64)
        p_values.append(float(stats.chi2.sf(float(off @ torch.linalg.solve(covariance, off)), 2)))
        variances.append(covariance.diagonal())
    return p_values, torch.stack(variances)


@pytest.mark.parametrize("corrected", [False, True])
def test_the_minimiser_is_the_score_of_the_tilted_gaussian(corrected: bool) -> None:
    """The best line is `s (x - a m) / (a^2 v + s^2)` with and without the control variate, at a 1e-5 false-alarm level.

    Control: the reward's sign reversed.
    """
    assert not alarms(fit_against_truth(corrected=corrected)[0])
    assert alarms(fit_against_truth(sign=-1.0, corrected=corrected)[0])


def test_the_control_variate_is_exact_for_an_exact_base_alone() -> None:
    """It lowers the line's variance near the data; a base that is off by 0.1 moves the corrected minimiser only."""
    plain, corrected = fit_against_truth(corrected=False)[1], fit_against_truth()[1]
    assert bool((corrected[0] < 0.2 * plain[0]).all())
    assert alarms(fit_against_truth(bias=0.1)[0])
    assert not alarms(fit_against_truth(bias=0.1, corrected=False)[0])


def test_equal_weights_leave_any_base_where_it_is() -> None:
    """With w = c = 1 the corrected loss has no gradient at the base's prediction, however wrong; the plain one has."""
    generator = torch.Generator().manual_seed(0)
    base, noise = torch.randn(2, 50, 3, generator=generator)
    ones, eps = torch.ones(50), base.clone().requires_grad_()
    (plain,) = torch.autograd.grad(weighted_loss(eps, noise, ones), eps)
    (extra,) = torch.autograd.grad(control_variate(eps, base, noise, ones), eps)
    assert torch.allclose(plain, -extra, atol=1e-7)
    assert float(plain.abs().max()) > 1e-3


@pytest.mark.parametrize("spread", [0.3, 1.0, 1.5])
def test_effective_samples_of_gaussian_rewards(spread: float) -> None:
    """Of n of them, n e^{-Var(r) / alpha^2} are effective where that is far above 1, to 3 %; else a few are left."""
    rewards = 2.0 * spread * torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    n = len(rewards)
    (size,) = effective_sizes(tilted_weights(rewards, n, 2.0), n)
    assert float(size) == pytest.approx(n * exp(-(spread**2)), rel=0.03)
    few = effective_sizes(tilted_weights(10 * rewards, 10, 2.0), 10)
    assert 1 <= float(few.mean()) < (2 if spread > 0.5 else 4)


BATCH, STEPS, POOL = 512, 1200, 40_000
TIMES = (0.2, 0.35, 0.5)
RING = registry.get("ring-of-six")
EAST = RING.rewards["east"]


def exact_noise(law: Law, x: Tensor, t: float | Tensor) -> Tensor:
    """The noise prediction `-sigma score` of a law, in closed form."""
    time = torch.as_tensor(t, dtype=torch.float64)
    return -expand_like(RING.schedule.sigma(time), x.double()) * law.noised(RING.schedule, time).score(x.double())


def trained(x0: Tensor, weights: Tensor, *, corrected: bool = False) -> Callable[[Tensor, float], Tensor]:
    """Noise prediction of a network trained on samples and weights by the trainer's own loss; Adam, cosine decay.

    Where `corrected` the loss has its control variate, by the prior's exact prediction.
    """
    schedule, generator = RING.schedule, torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    network = ScoreNetwork(2, 64)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    (log_normalizer,) = log_normalizers(EAST(x0), len(x0), RING.alpha)

    for _ in range(STEPS):
        t = 0.05 + 0.75 * torch.rand(BATCH, generator=generator)
        rows = torch.randint(len(x0), (BATCH,), generator=generator)
        noise = torch.randn(BATCH, 2, generator=generator)
        a, s = (expand_like(coefficient(t), noise) for coefficient in (schedule.alpha, schedule.sigma))
        x = a * x0[rows].float() + s * noise
        eps = network(x, t)
        loss = weighted_loss(eps, noise, weights[rows].float())
        if corrected:
            base = exact_noise(RING.prior, x, t).float()
            promise = (EAST(((x - s * base) / a).double()) / RING.alpha - log_normalizer).exp()
            loss = loss + control_variate(eps, base, noise, promise.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return lambda x, t: network(x, torch.full((len(x),), t)).detach()


@pytest.mark.slow
def test_the_ring_of_six_learns_its_tilted_score() -> None:
    """The weighted networks have the target's score, up to what a network trained on draws of the target itself has.

    E|s - s_tar|^2 / E|s_tar - s_pre|^2 under the target's noised law; the prior's own score has 1. Control: without
    weights the network stays at the prior's.
    """
    generator = torch.Generator().manual_seed(0)
    prior, target = RING.prior, tilt(RING.prior, EAST, RING.alpha)
    x0 = prior.sample(POOL, generator=generator)
    weights = tilted_weights(EAST(x0), POOL, RING.alpha)
    effective = int(effective_sizes(weights, POOL))
    networks = {
        "corrected": trained(x0, weights, corrected=True),
        "weighted": trained(x0, weights),
        "floor": trained(target.sample(effective, generator=generator), torch.ones(effective)),
        "unweighted": trained(x0, torch.ones(POOL)),
    }
    errors: dict[str, list[float]] = {name: [] for name in networks}
    for t in TIMES:
        clean, noise = target.sample(4000, generator=generator), torch.randn(4000, 2, generator=generator)
        x = float(RING.schedule.alpha(t)) * clean + float(RING.schedule.sigma(t)) * noise
        exact = exact_noise(target, x, t)
        control = (exact - exact_noise(prior, x, t)).square().sum()
        for name, network in networks.items():
            errors[name].append(float((network(x.float(), t) - exact).square().sum() / control))
    # seen, by time: corrected .027 .002 .002, weighted .032 .002 .002, floor .014 .002 .001, unweighted .97 1.01 .98
    assert min(errors["unweighted"]) > 0.7
    for name in ("weighted", "corrected"):
        assert max(errors[name]) < 0.1
        assert max(e / floor for e, floor in zip(errors[name], errors["floor"], strict=True)) < 5
