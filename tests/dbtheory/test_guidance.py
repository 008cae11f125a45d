"""Guided experts: the convention, what they formally aim at, and that they do not sample it."""

import math

import pytest
import torch

from dbtheory import (
    VE,
    ExactExperts,
    GaussianMixture,
    LinearReward,
    MeanBlend,
    Preference,
    QuadraticReward,
    VPLinear,
    sample,
    tilt,
)
from dbtheory.blend import Step
from dbtheory.correct import FeynmanKac
from dbtheory.experts import Experts
from dbtheory.guidance import GuidedExperts, guided_target
from dbtheory.parametrization import convert
from dbtheory.sampler import time_grid

ONE = torch.ones(1, 1, dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)
REWARD = LinearReward(0.4 * EYE[0])


def mixture(weights):
    means = torch.tensor([[-1.5, 0.0], [1.0, 1.0], [0.5, -1.0]], dtype=torch.float64)
    return GaussianMixture(torch.tensor(weights, dtype=torch.float64), means, (0.5 * EYE).expand(3, 2, 2))


FREE, BOUND = mixture([0.4, 0.3, 0.3]), mixture([0.1, 0.3, 0.6])


def experts(law, kind="score", schedule=None, rewards=None):
    return ExactExperts(law, rewards or {"up": REWARD}, 1.0, schedule or VPLinear(), kind)


def cloud(n=20):
    return 2 * torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("s", [-0.5, 0.3, 2.0, 7.5])
def test_guidance_in_diffusers_convention(s):
    """`uncond + s (cond - uncond)` in every parametrisation, one expert a point too; scores by autograd."""
    x, t = cloud(), 0.4
    for kind in ("score", "eps", "x0", "v"):
        guided = GuidedExperts(experts(BOUND, kind), experts(FREE, kind), s)
        assert isinstance(guided, Experts)
        predictions = guided.predict(x, t, ["up", "base"])
        for name, prediction in zip(("up", "base"), predictions, strict=True):
            point = x.clone().requires_grad_()
            laws = [experts(law).targets[name].noised(VPLinear(), t) for law in (FREE, BOUND)]
            mixed = (1 - s) * laws[0].log_prob(point) + s * laws[1].log_prob(point)
            (score,) = torch.autograd.grad(mixed.sum(), point)
            actual = convert(prediction, x, t, VPLinear(), kind, "score")
            torch.testing.assert_close(actual, score, rtol=1e-9, atol=1e-9)
        each = guided.predict_each(x, t, torch.tensor([0, 1]).repeat(10))
        torch.testing.assert_close(each[0::2], predictions[1][0::2], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(each[1::2], predictions[0][1::2], rtol=1e-12, atol=1e-12)


def test_no_guidance_is_the_conditional_model_bit_for_bit():
    """s = 1 is the conditional set and s = 0 the unconditional one, and the other is never evaluated."""

    class Forbidden(ExactExperts):
        def predict(self, x, t, names):
            raise AssertionError("evaluated for nothing")

    never = Forbidden(FREE, {"up": REWARD}, 1.0, VPLinear())
    known = experts(BOUND)
    expected = known.predict(cloud(), 0.4, ["base", "up"])
    assert torch.equal(GuidedExperts(known, never, 1.0).predict(cloud(), 0.4, ["base", "up"]), expected)
    assert torch.equal(GuidedExperts(never, known, 0).predict(cloud(), 0.4, ["base", "up"]), expected)


def test_guided_target_is_the_product():
    """The grid holds `p_u^(1-s) p_c^s e^(r/alpha)`: ratios of densities are exact, its score is that at t = 0."""
    s, points = 2.5, cloud(8) / 3
    law = guided_target(tilt(BOUND, REWARD, 0.8), tilt(FREE, REWARD, 0.8), s, [-6.0, -6.0], [6.0, 6.0], [241, 241])
    x = points.clone().requires_grad_()
    expected = (1 - s) * FREE.log_prob(x) + s * BOUND.log_prob(x) + REWARD(x) / 0.8
    difference = law.log_prob(points) - expected.detach()
    torch.testing.assert_close(difference, difference.mean().expand(8), rtol=0.0, atol=1e-3)
    (score,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(law.score(points), score, rtol=0.0, atol=2e-2)
    assert law.discretisation_error < 1e-2


def test_a_product_without_finite_mass_shows_on_the_rim():
    """p_u narrower than p_c and s = 3 make a density that grows outwards: the grid reports it."""
    narrow, wide = GaussianMixture(ONE[0], 0 * ONE, 0.5 * ONE[None]), GaussianMixture(ONE[0], 0 * ONE, ONE[None])
    assert guided_target(wide, narrow, 0.5, [-6.0], [6.0], [201]).discretisation_error < 0.01
    assert guided_target(wide, narrow, 3.0, [-6.0], [6.0], [201]).discretisation_error > 0.5


def test_guidance_is_kla_and_only_the_correction_reaches_its_target():
    """Gaussians: guided steps are DB-KLA's with reward log p_c/p_u and lambda = s, so Feynman-Kac corrects them.

    The formal density is N(2s/(1+s), 1/(1+s)). Over seeds guided samples miss its mean and variance by 0.26, and
    corrected ones by at most 0.02.
    """
    free, bound = GaussianMixture(ONE[0], 0 * ONE, ONE[None]), GaussianMixture(ONE[0], ONE, 0.5 * ONE[None])
    none, s = {"none": LinearReward(0 * ONE[0])}, 3.0
    both = experts(free, rewards={"class": QuadraticReward(ONE, 2 * ONE[0])})
    guided = GuidedExperts(experts(bound, rewards=none), experts(free, rewards=none), s)
    x, step = cloud()[:, :1], Step(0, 1, 0.4, 0.3, torch.zeros(20, dtype=torch.float64))
    kla = MeanBlend(Preference({"class": 1.0}, s))
    torch.testing.assert_close(guided.predict(x, 0.4, ["base"])[0], kla(both, x, 0.4, step), rtol=1e-12, atol=1e-12)

    def miss(source, blend, correct):
        grid, generator = time_grid(VPLinear(), 200, power=2.0), torch.Generator().manual_seed(0)
        run = sample(source, blend, 20_000, 200, generator, method="euler", grid=grid, correct=correct)
        return math.hypot(float(run.mean()) - 2 * s / (1 + s), float(run.var()) - 1 / (1 + s))

    assert miss(both, kla, FeynmanKac(ess=0.8)) < 0.06
    assert miss(guided, MeanBlend(Preference({"none": 1.0}, 0.0)), None) > 0.25


def test_bad_input():
    """Sets of experts that do not match, and a guidance that is no number, are refused with what differs."""
    for s in (math.nan, math.inf):
        with pytest.raises(ValueError, match="guidance must be finite"):
            GuidedExperts(experts(BOUND), experts(FREE), s)
    for other, said in [
        (experts(FREE, kind="eps"), "differ in parametrization"),
        (experts(FREE, schedule=VE()), "differ in schedule"),
        (experts(FREE, rewards={"down": REWARD}), "differ in names"),
    ]:
        with pytest.raises(ValueError, match=said):
            GuidedExperts(experts(BOUND), other, 2.0)
    with pytest.raises(ValueError, match="one or two axes"):
        guided_target(BOUND, FREE, 2.0, [-6.0] * 3, [6.0] * 3, [11] * 3)
