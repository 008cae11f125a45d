"""Feynman-Kac correction against a world where weighted laws stay Gaussian and are known without Monte Carlo."""

import math

import pytest
import torch
from scipy import stats

from dbtheory import (
    LinearReward,
    MeanBlend,
    PrecisionBlend,
    Preference,
    RectifiedFlow,
    SampledBlend,
    VPLinear,
    sample,
    tilt,
)
from dbtheory.blend import Step
from dbtheory.correct import FeynmanKac, Trace, ancestral_rate, euler_rate, score_variance
from dbtheory.interpolate import InterpolatedBlend
from dbtheory.precision import log_normalizer
from dbtheory.resampling import effective_size
from dbtheory.sampler import time_grid
from dbtheory.steps import ddpm_step, euler_maruyama_step, posterior_gain, posterior_variance
from dbtheory.tilt import log_normalizer as reward_normalizer
from tests.chance import alarms
from tests.dbtheory.gaussian_world import EYE, REWARDS, SCHEDULE, Weighted, product, weighted_chain, world
from tests.dbtheory.wrapped import Wrapped

BOTH = {"round": 0.3, "long": 0.7}
ONE = {"round": 1.0, "long": 0.0}
SETTINGS = [(BOTH, 1.0), (ONE, 0.4), (BOTH, 1.6)]
# method, eta, form
KERNELS = [
    ("euler", 1.0, "continuous"),
    ("ddpm", 1.0, "continuous"),
    ("ddpm", 1.0, "discrete"),
    ("ddim", 0.5, "continuous"),
    ("ddim", 0.0, "continuous"),
]


def coefficients(weights, scale):
    return Preference(weights, scale).coefficients()


@pytest.mark.parametrize(("weights", "scale"), SETTINGS)
@pytest.mark.parametrize(("method", "eta", "form"), KERNELS)
def test_weights_lead_to_the_target_at_first_order(method, eta, form, weights, scale):
    """Half the step, half the error of mass, mean and covariance, and the limit is the product of the experts.

    The continuous weights hold for every eta, zero included. Negative control: the other sign converges too, but
    elsewhere.
    """
    experts, c, end = world(), coefficients(weights, scale), 0.02
    grids = [time_grid(SCHEDULE, n) * (1 - end) + end for n in (100, 200, 400)]
    exact = product(experts, c, grids[0][-1]).numbers
    results = [weighted_chain(experts, c, grid, method, eta, form).numbers for grid in grids]
    errors = [(result - exact).norm() for result in results]
    assert 1.8 < float(errors[0] / errors[1]) < 2.2
    coarse, fine = ((2 * results[i + 1] - results[i] - exact).norm() for i in (0, 1))
    assert float(fine) < 0.1 * float(errors[2])
    assert 2.5 < float(coarse / fine) < 6
    flipped = weighted_chain(experts, c, grids[-1], method, eta, form, sign=1.0).numbers
    assert float((flipped - exact).norm()) > 5 * float(errors[2])


@pytest.mark.parametrize("form", ["continuous", "discrete"])
def test_the_last_ancestral_step_is_weighed_to_second_order(form):
    """From the exact law at t = h to the data the mass errs by O(h^2): a rate that diverges would not."""
    experts, c = world(), coefficients(BOTH, 1.6)
    exact = product(experts, c, 0.0).log_mass

    def error(h):
        grid = torch.tensor([h, 0.0], dtype=torch.float64)
        return float((weighted_chain(experts, c, grid, "ddpm", 1.0, form).log_mass - exact).abs())

    assert 3.5 < error(0.01) / error(0.005) < 4.5


def test_product_mass_is_the_ratio_of_normalizers():
    """`integral prod_i p_i^{c_i} = Z_w / prod_i Z_i^{c_i}` at t = 0, for lambda below and above 1."""
    experts = world()
    prior = experts.targets["base"]
    for weights, scale in SETTINGS:
        reward = sum(w * REWARDS[name] for name, w in weights.items())
        ratio = reward_normalizer(prior, reward, 0.7 / scale) - scale * sum(
            w * reward_normalizer(prior, REWARDS[name], 0.7) for name, w in weights.items()
        )
        law = product(experts, coefficients(weights, scale), 0.0)
        torch.testing.assert_close(law.log_mass, ratio, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(law.mean, tilt(prior, reward, 0.7 / scale).mean, rtol=1e-9, atol=1e-11)


def test_rates_against_their_definitions():
    """The ancestral rate is the SNR's growth in x0 units, tends to Euler's as h falls, and is Euler's at the data."""
    for schedule in (VPLinear(), RectifiedFlow()):
        for t, s in [(0.9, 0.7), (0.3, 0.2)]:
            snr = [(schedule.alpha(u) / schedule.sigma(u)) ** 2 for u in (s, t)]
            expected = (snr[0] - snr[1]) * schedule.variance(t) ** 2 / schedule.alpha(t) ** 2
            torch.testing.assert_close(ancestral_rate(schedule, t, s), expected, rtol=1e-10, atol=0.0)
        t = torch.tensor(0.4, dtype=torch.float64)
        torch.testing.assert_close(
            ancestral_rate(schedule, t, t - 1e-5), euler_rate(schedule, t, t - 1e-5), rtol=1e-3, atol=0.0
        )
        assert ancestral_rate(schedule, 0.01, 0.0) == euler_rate(schedule, 0.01, 0.0)


class Spy(Wrapped):
    """Experts that remember where they were asked."""

    def __init__(self, experts):
        super().__init__(experts)
        self.path = []

    def predict(self, x, t, names):
        self.path.append((x, t))
        return self.inner.predict(x, t, names)


def autograd_scores(experts, x, t):
    x = x.detach().requires_grad_()
    laws = {name: law.noised(experts.schedule, t) for name, law in experts.targets.items()}
    return {name: torch.autograd.grad(law.log_prob(x).sum(), x)[0] for name, law in laws.items()}


@pytest.mark.parametrize("kind", ["score", "eps", "x0", "v"])
@pytest.mark.parametrize("method", ["euler", "ddpm"])
def test_recorded_weights_are_the_formula(method, kind):
    """Along recorded paths the weights are `-1/2 g^2 (sum c |s_i|^2 - |s_bar|^2) h`, scores by autograd.

    One evaluation a step serves blend and weights, and a trace alone does not change the samples.
    """
    spy, trace = Spy(world(kind)), Trace()
    c = coefficients(BOTH, 1.6)
    blend = MeanBlend(Preference(BOTH, 1.6))
    x = sample(spy, blend, 30, 12, torch.Generator().manual_seed(0), method=method, trace=trace)
    assert len(spy.path) == 12
    assert torch.equal(x, sample(world(kind), blend, 30, 12, torch.Generator().manual_seed(0), method=method))
    expected = torch.zeros(30, dtype=torch.float64)
    for k, (here, t) in enumerate(spy.path):
        scores = autograd_scores(spy, here, t)
        mean = sum(c_i * scores[name] for name, c_i in c.items())
        variance = sum(c_i * scores[name].square().sum(-1) for name, c_i in c.items()) - mean.square().sum(-1)
        t_next = spy.path[k + 1][1] if k < 11 else 0.0
        expected = expected - 0.5 * SCHEDULE.diffusion_squared(t) * (t - t_next) * variance
        torch.testing.assert_close(trace.log_weights[k], expected, rtol=1e-8, atol=1e-9)
        assert float(trace.ess[k]) == pytest.approx(effective_size(expected))
    torch.testing.assert_close(trace.certificate, -expected, rtol=1e-8, atol=1e-9)
    assert trace.resamplings == []
    assert trace.log_normalizer == pytest.approx(float(expected.exp().mean().log()))


def test_discrete_weights_are_the_kernels_normalizer():
    """The discrete form is the log-normaliser of the product of the step's Gaussian kernels (MATH.md 7)."""
    experts, c = world("x0"), coefficients(BOTH, 1.6)
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t, s in [(0.9, 0.8), (0.4, 0.3), (0.05, 0.01)]:
        predictions = experts.predict(x, t, list(c))
        blended = sum(c_i * p for c_i, p in zip(c.values(), predictions, strict=True))
        variance = score_variance(predictions, blended, list(c.values()), t, SCHEDULE, "x0")
        means = torch.stack([ddpm_step(x, p, t, s, 0 * x, SCHEDULE) for p in predictions])
        kernels = (posterior_variance(SCHEDULE, t, s) * EYE).expand(3, 1, 2, 2)
        expected = log_normalizer(torch.tensor(list(c.values()), dtype=torch.float64), means, kernels)
        torch.testing.assert_close(-0.5 * ancestral_rate(SCHEDULE, t, s) * variance, expected, rtol=1e-8, atol=1e-10)
        assert posterior_gain(SCHEDULE, t, s) > 0


def test_score_variance_of_images():
    """Events of any shape count all their entries, and samples of different precision agree."""
    predictions = torch.randn(3, 5, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    c = [-0.5, 0.6, 0.9]
    blended = sum(c_i * p for c_i, p in zip(c, predictions, strict=True))
    expected = sum(c_i * p.square().sum((1, 2, 3)) for c_i, p in zip(c, predictions, strict=True))
    expected = (expected - blended.square().sum((1, 2, 3))) / SCHEDULE.variance(0.3)
    torch.testing.assert_close(score_variance(predictions, blended, c, 0.3, SCHEDULE, "eps"), expected)
    single = score_variance(predictions.float(), blended.float(), c, 0.3, SCHEDULE, "eps")
    torch.testing.assert_close(single, expected, rtol=1e-4, atol=1e-3)


STEPS, START = 25, (torch.tensor(0.0, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 1.0 * EYE)


def runs(experts, blend, correct, count, n, method="euler"):
    """Independent runs: from each its mean weight, and its samples' mean and mean squares."""
    rows = []
    for seed in range(count):
        trace = Trace()
        generator = torch.Generator().manual_seed(seed)
        x = sample(experts, blend, n, STEPS, generator, method=method, correct=correct, trace=trace)
        mass = torch.tensor([math.exp(trace.log_normalizer)], dtype=torch.float64)
        rows.append(torch.cat([mass, x.mean(0), (x**2).mean(0)]))
    return torch.stack(rows)


def p_values(rows, law):
    """By t-tests over the runs: samples of one resampled run are not independent."""
    expected = torch.cat([law.log_mass.exp().reshape(1), law.mean, law.covariance.diagonal() + law.mean**2])
    return [
        float(stats.ttest_1samp(column.numpy(), float(value)).pvalue)
        for column, value in zip(rows.T, expected, strict=True)
    ]


@pytest.mark.parametrize(
    ("blend", "correct", "method"),
    [
        (MeanBlend(Preference(BOTH)), FeynmanKac(), "euler"),
        (MeanBlend(Preference(ONE, 0.4)), FeynmanKac(ess=0.9), "ddpm"),
        (MeanBlend(Preference(BOTH, 1.6)), FeynmanKac(ess=1.0, form="discrete"), "ddpm"),
        (MeanBlend(Preference(BOTH, 1.6)), FeynmanKac(ess=0.0), "euler"),
    ],
)
def test_resampled_runs_follow_the_weighted_chain(blend, correct, method):
    """Mean weight and moments of corrected runs are the recursion's, to 1e-5 over all.

    Negative control: a plain blend's moments are not.
    """
    experts, grid = world(), time_grid(SCHEDULE, STEPS)
    c = blend.preference.coefficients()
    law = weighted_chain(experts, c, grid, method, 1.0, correct.form, start=Weighted(*START))
    assert not alarms(p_values(runs(experts, blend, correct, 24, 300, method), law))
    assert alarms(p_values(runs(experts, blend, None, 24, 1500, method), law)[1:])


def test_interpolated_blends_have_the_same_target():
    """The coefficients of quadratic interpolation reproduce r(w), so it is corrected to the same law."""
    rewards = REWARDS | {"middle": 0.5 * REWARDS["round"] + 0.5 * REWARDS["long"]}
    experts, preference = world(rewards=rewards), Preference(BOTH)
    blend = InterpolatedBlend(preference, {("round", "long"): "middle"})
    c = blend.coefficients(Step(0, 1, 1.0, 0.0, torch.zeros(1, dtype=torch.float64)))
    ours, plain = product(experts, c, 0.0), product(experts, preference.coefficients(), 0.0)
    torch.testing.assert_close(ours.numbers[1:], plain.numbers[1:], rtol=1e-10, atol=1e-10)
    law = weighted_chain(experts, c, time_grid(SCHEDULE, STEPS), "euler", 1.0, "continuous", start=Weighted(*START))
    assert not alarms(p_values(runs(experts, blend, FeynmanKac(), 24, 300), law))


def test_all_state_travels_with_a_resampled_sample():
    """After each resampling position, phase and certificate are those of one ancestor each."""

    class Phases(MeanBlend):
        """Remembers the phases that it saw."""

        def coefficients(self, step):
            seen.append(step.phase)
            return super().coefficients(step)

    seen, steps, n, c = [], 8, 40, coefficients(BOTH, 3.0)
    spy, trace, experts = Spy(world()), Trace(), world()
    noise = torch.randn(steps, n, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sample(
        spy, Phases(Preference(BOTH, 3.0)), n, steps, torch.Generator().manual_seed(0),
        method="euler", noise=noise, correct=FeynmanKac(ess=0.95), trace=trace,
    )  # fmt: skip
    k, last = trace.resamplings
    assert 0 < k < last == steps - 1
    kept = (seen[k + 1][:, None] == seen[k]).nonzero()[:, 1]
    assert len(kept.unique()) < n == len(kept)
    (x, t), (arrived, t_next) = spy.path[k : k + 2]
    score = sum(c[name] * value for name, value in autograd_scores(experts, x, t).items())
    moved = euler_maruyama_step(x[kept], score[kept], t, t_next, noise[k], SCHEDULE)
    torch.testing.assert_close(arrived, moved, rtol=1e-9, atol=1e-9)
    before_last = -trace.log_weights[k][kept] - trace.log_weights[last]
    apart = (trace.certificate[:, None] - before_last).abs().amin(1)
    assert float(apart.max()) < 1e-12


def test_one_target_has_nothing_to_correct():
    """A one-hot preference has equal weights: the expert's own samples, bit for bit, and certificates of zero."""
    blend = MeanBlend(Preference(ONE))
    for ess in (0.0, 1.0):
        trace = Trace()
        plain, corrected = (
            sample(world(), blend, 30, 9, torch.Generator().manual_seed(0), correct=correct, trace=trace)
            for correct in (None, FeynmanKac(ess))
        )
        assert torch.equal(plain, corrected)
        assert trace.log_normalizer == pytest.approx(0.0, abs=1e-12)
        assert not trace.certificate.any()
        assert trace.resamplings == []


def test_threshold_zero_resamples_once_at_the_end():
    """With ess = 0 the weights of the whole path act at the last step; a used trace is cleared first."""
    trace = Trace()
    for seed in (0, 1):
        sample(
            world(), MeanBlend(Preference(ONE, 1.6)), 50, 9, torch.Generator().manual_seed(seed),
            correct=FeynmanKac(0.0), trace=trace,
        )  # fmt: skip
    assert trace.resamplings == [8]
    assert trace.ess.shape == (9,)
    assert trace.log_weights.shape == (9, 50)
    assert trace.log_normalizer == pytest.approx(float(trace.log_weights[-1].exp().mean().log()))
    assert bool((trace.certificate < 0).all())


ROWS = torch.full((4,), 0.5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("blend", "options", "said"),
    [
        (SampledBlend(Preference(BOTH)), {}, "received SampledBlend; use MeanBlend"),
        (PrecisionBlend(Preference(BOTH), dict.fromkeys(["base", *BOTH], 1.0)), {}, "received PrecisionBlend"),
        (MeanBlend(Preference({"round": ROWS, "long": 1 - ROWS})), {}, "call sample once for each preference"),
        (MeanBlend(Preference(BOTH, lambda progress: progress)), {}, "changes with progress"),
        (MeanBlend(Preference({"round": 0.5, "square": 0.5})), {}, r"needs experts \['square'\]"),
        (MeanBlend(Preference(BOTH)), {"method": "ddim", "eta": 0.0}, "eta > 0"),
        (MeanBlend(Preference(BOTH)), {"method": "ddim", "eta": 0.5, "correct": FeynmanKac(form="discrete")}, "eta=1"),
    ],
)
def test_what_cannot_be_corrected_is_refused(blend, options, said):
    """Each blend and method without a Feynman-Kac weight, or with many targets, is an error that says what to use."""
    with pytest.raises(ValueError, match=said):
        sample(world(), blend, 4, 5, torch.Generator().manual_seed(0), **{"correct": FeynmanKac()} | options)


def test_bad_input():
    """Thresholds outside [0, 1], unknown forms, missing generators and infinite weights are ValueErrors."""
    for ess in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="ess is a share"):
            FeynmanKac(ess)
    with pytest.raises(ValueError, match="form must be"):
        FeynmanKac(form="exact")
    blend, noise = MeanBlend(Preference(BOTH)), torch.zeros(5, 4, 2, dtype=torch.float64)
    x_T = torch.arange(8, dtype=torch.float64).reshape(4, 2)
    with pytest.raises(ValueError, match="pass a generator"):
        sample(world(), blend, 4, 5, x_T=x_T, noise=noise, phase=noise[0, :, 0], correct=FeynmanKac())
    with pytest.raises(ValueError, match="not finite at step 0"):
        sample(world(), blend, 4, 5, torch.Generator().manual_seed(0), x_T=1e200 * x_T, correct=FeynmanKac())


def test_a_linear_reward_world_needs_no_weights_within_one_family():
    """Linear rewards move a Gaussian without bending it: every sample has the same weight, and DB is exact."""
    experts = world(rewards={"up": LinearReward(EYE[1]), "side": LinearReward(EYE[0])})
    trace = Trace()
    blend = MeanBlend(Preference({"up": 0.4, "side": 0.6}, 1.5))
    sample(experts, blend, 50, 10, torch.Generator().manual_seed(0), trace=trace)
    torch.testing.assert_close(trace.ess, torch.ones(10, dtype=torch.float64), rtol=1e-12, atol=1e-12)
