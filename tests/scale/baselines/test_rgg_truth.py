"""Reward gradient guidance where its answer is known: Gaussian data, quadratic rewards; and finite differences."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from scale.baselines.chain import PipelineChain
from scale.baselines.gradient import _gradient, guide, strength
from scale.baselines.ledger import Ledger
from scale.rewards import Scorer
from tests.chance import alarms, mean_p_value
from tests.scale import tiny
from tests.scale.baselines.chains import AffineChain, guided, tweedie
from tests.scale.train.gaussian import Quadratic, Steps, ancestral, marginals

STEPS, FIRST, VARIANCE, ALPHA, GAMMA = 12, 0.05, 0.5, 2.0, 0.2
MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64)
REWARD = Quadratic(
    torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64), torch.tensor([1.0, -2.0], dtype=torch.float64)
)
GROWING = [strength(k, GAMMA) / ALPHA for k in range(STEPS)]


def base() -> Steps:
    return ancestral(MEAN, VARIANCE, STEPS, FIRST)


def exact(scales: Sequence[float], reward: Quadratic = REWARD) -> Steps:
    """The guided chain, its guesses by Tweedie's formula and not by the chain's own means."""
    a = torch.cos(torch.linspace(torch.tensor(FIRST).acos(), 0, STEPS + 1, dtype=torch.float64))
    return guided(base(), reward, [tweedie(MEAN, VARIANCE, level) for level in a[:-1]], scales)


def samples(scales: Sequence[float], n: int, rewards: Sequence[tuple[float, Any]] = ((1.0, REWARD),)) -> Tensor:
    return guide(
        AffineChain(base()), [""] * n, list(range(n)), rewards, scales=scales, normalise=False, max_rows=n
    )  # fmt: skip


def test_every_sample_follows_the_closed_form() -> None:
    """x_0 equals that of the affine chain `A - scale s^2 G Q G, b + ...` under the same noise, to float64's rounding.

    With no guidance it is the base's; a chain with the sign turned, or lambda falling, is far from it.
    """
    x = {name: samples(scales, 5) for name, scales in {"on": GROWING, "off": [0.0] * STEPS}.items()}
    turned, falling = [-scale for scale in GROWING], GROWING[::-1]
    ends = {"on": exact(GROWING), "off": base(), "turned": exact(turned), "falling": exact(falling)}
    ends = {name: AffineChain(steps) for name, steps in ends.items()}
    found = {name: guide(chain, [""] * 5, range(5), [(0.0, REWARD)], scales=[0.0] * STEPS, normalise=False, max_rows=5)
             for name, chain in ends.items()}  # fmt: skip
    for name in ("on", "off"):
        torch.testing.assert_close(x[name], found[name], rtol=1e-10, atol=1e-10)
    for name in ("off", "turned", "falling"):
        assert float((x["on"] - found[name]).abs().max()) > 0.05


def p_values(x: Tensor, steps: Steps) -> list[float]:
    """Of the means, and of the centred products against the covariance's entries."""
    mean, covariance = marginals(steps)[-1]
    centred = x - mean
    tests = [mean_p_value(x[:, i], float(mean[i])) for i in range(2)]
    pairs = [(0, 0), (0, 1), (1, 1)]
    return tests + [mean_p_value(centred[:, i] * centred[:, j], float(covariance[i, j])) for i, j in pairs]


def test_the_law_is_the_closed_form() -> None:
    """Means and covariance of 4,000 samples, at level 1e-5; the wrong sign, schedule or alpha would be seen."""
    x = samples(GROWING, 4000)
    assert not alarms(p_values(x, exact(GROWING)))
    for wrong in ([-s for s in GROWING], GROWING[::-1], [s / 2 for s in GROWING], [0.0] * STEPS):
        assert alarms(p_values(x, exact(wrong)))


def test_rewards_add_by_their_weights() -> None:
    """Without normalisation (eq. 13) the gradients' sum is the gradient of the weighted sum, in one pass back."""
    other = Quadratic(0.2 * torch.eye(2, dtype=torch.float64), torch.tensor([-1.0, 1.0], dtype=torch.float64))
    mixed = Quadratic(0.3 * REWARD.curvature + 0.7 * other.curvature, 0.3 * REWARD.slope + 0.7 * other.slope)
    two, one = (samples(GROWING, 4, rewards) for rewards in ([(0.3, REWARD), (0.7, other)], [(1.0, mixed)]))
    torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-10)


def test_each_gradient_has_norm_one() -> None:
    """eq. 14: sum_i w_i g_i/|g_i| with the norm over the whole sample, each sample its own; scales do not matter.

    A reward without slope adds nothing, a negative weight turns its direction.
    """
    flat = Quadratic(torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    other = Quadratic(torch.zeros(2, 2, dtype=torch.float64), torch.tensor([0.0, 500.0], dtype=torch.float64))
    chain, k, ledger = AffineChain(base()), 3, Ledger()
    x = chain.draw([torch.Generator().manual_seed(seed) for seed in range(4)])
    rewards = [(0.6, REWARD), (-0.4, other), (0.2, flat)]
    g = _gradient(chain, x, k, chain.encode([""] * 4), [""] * 4, rewards, True, ledger)[2]
    clean = chain.step(x, torch.full((4,), k), chain.encode([""] * 4))[2]
    first = REWARD.slope - clean @ REWARD.curvature  # Tweedie's gain is a positive number: it cancels
    expected = 0.6 * first / first.norm(dim=1, keepdim=True) + torch.tensor([0.0, -0.4], dtype=torch.float64)
    torch.testing.assert_close(g, expected, rtol=1e-10, atol=1e-10)
    assert (ledger.reward_calls, ledger.gradients) == (4, 12)


def test_lambda_grows_towards_the_data() -> None:
    """As printed (1 + gamma)^(t - 1) for the t-th step of generation; Kim et al.'s grows from nearly 0 to at most 1."""
    assert [strength(k, 0.024) for k in (0, 1, 49)] == pytest.approx([1.0, 1.024, 1.024**49])
    das = [strength(k, 0.024, "das") for k in range(50)]
    assert das[0] == pytest.approx(0.024)
    assert das == sorted(das)
    assert max(das) == 1.0


class Pattern(Scorer):
    """A smooth score that hangs on every pixel."""

    name = "pattern"
    differentiable = True

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        weights = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(7)).to(images)
        return (weights * (images + images**2)).sum((1, 2, 3)) / 10


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("make", [tiny.sd, tiny.v_prediction, tiny.sdxl])
def test_the_gradient_is_that_of_finite_differences(make: Callable[[], Any], guidance: float) -> None:
    """Of r(decode(E[x_0 | x_t])) by x_t along random directions, through guidance, denoiser and autoencoder, to 1 %.

    The gradient that leaves the denoiser out, `1/sqrt(alpha)` times the decoder's, is off by more.
    """
    chain, reward, prompts = PipelineChain(make(), 4, guidance, 1.0), Pattern(), ["a red circle", "a blue star"]
    x = chain.draw([torch.Generator().manual_seed(seed) for seed in (0, 1)])
    with torch.no_grad():
        condition = chain.encode(prompts)
    g = _gradient(chain, x, 2, condition, prompts, [(2.0, reward)], False, Ledger())[2]
    directions = [torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    at = torch.full((2,), 2)

    @torch.no_grad()
    def value(x: Tensor) -> Tensor:
        return 2 * reward.score(chain.decode(chain.step(x, at, condition)[2]), prompts)

    clean = chain.step(x, at, condition)[2].detach().requires_grad_()
    without = torch.autograd.grad(2 * reward.score(chain.decode(clean), prompts).sum(), clean)[0]
    without = without / chain.alphas[2].sqrt()
    errors = {"g": 0.0, "without": 0.0}
    for d in [*directions, 8 * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)]:
        h = 1e-2
        measured = (value(x + h * d) - value(x - h * d)) / (2 * h)
        size = (g.flatten(1).norm(dim=1) * d.flatten(1).norm(dim=1)).max()
        for name, gradient in {"g": g, "without": without}.items():
            predicted = (gradient * d).sum((1, 2, 3))
            errors[name] = max(errors[name], float(((predicted - measured) / size).abs().max()))
    assert errors["g"] < 1e-2
    assert errors["without"] > 2e-2
