"""The samplers against exact answers: affine recursions, weak orders, diffusers, and known laws."""

from itertools import pairwise

import pytest
import torch
from scipy import stats

import toys
from dbtheory import (
    VE,
    ExactExperts,
    GaussianMixture,
    LinearReward,
    MeanBlend,
    Preference,
    RectifiedFlow,
    SampledBlend,
    VPCosine,
    VPDiscrete,
    VPLinear,
    sample,
)
from dbtheory.blend import NoisyBlender, Step
from dbtheory.sampler import time_grid
from tests.chance import alarms

MEAN = torch.tensor([1.0, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.8, 0.3], [0.3, 0.4]], dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)
BASE = MeanBlend(Preference({"up": 1.0}, kl_scale=0.0))
METHODS = [("euler", 0.0), ("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5)]
SCHEDULES = [VPLinear(), VPCosine(), VPDiscrete(), VE(), RectifiedFlow()]


def gaussian(schedule, kind="score"):
    prior = GaussianMixture(torch.ones(1, dtype=torch.float64), MEAN[None], COVARIANCE[None])
    return ExactExperts(prior, {"up": LinearReward(EYE[1])}, 1.0, schedule, kind)


def noised(schedule, t):
    """The exact law of x_t."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return alpha * MEAN, alpha**2 * COVARIANCE + sigma**2 * EYE


def sampler_moments(schedule, grid, method, eta, kind="score"):
    """Exact mean and covariance of the sampler's output, without Monte Carlo: its map is affine.

    The start has the exact law of x at the first time, so that only the steps err. One row carries the mean,
    the others carry one column each of the square root of the start's or of a step's noise.
    """
    steps = len(grid) - 1
    mean, covariance = noised(schedule, grid[0])
    root = torch.linalg.cholesky(covariance)
    rows = 1 + 2 + 2 * steps
    x_T, noise = mean.repeat(rows, 1), torch.zeros(steps, rows, 2, dtype=torch.float64)
    x_T[1:3] += root.T
    for k in range(steps):
        noise[k, 3 + 2 * k : 5 + 2 * k] = EYE
    x = sample(
        gaussian(schedule, kind), BASE, rows, steps, method=method, eta=eta,
        x_T=x_T, noise=noise, phase=torch.zeros(rows, dtype=torch.float64), grid=grid,
    )  # fmt: skip
    columns = x[1:] - x[0]
    return x[0], columns.T @ columns


def recursion(schedule, grid, method, eta):
    """The same moments by the closed recursion `mean <- A mean + b`, `cov <- A cov A' + B`."""
    mean, covariance = noised(schedule, grid[0])
    for t, s in pairwise(grid):
        m_t, c_t = noised(schedule, t)
        gain = torch.linalg.inv(c_t)
        a_t, s_t, a_s, s_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
        if method == "euler":
            f, g2, h = schedule.drift_rate(t), schedule.diffusion_squared(t), t - s
            matrix, shift = (1 - f * h) * EYE - g2 * h * gain, g2 * h * gain @ m_t
            variance = g2 * h
        else:
            # x_s = a_s x0 + ratio (x - a_t x0) + noise, x0 = E[x_0 | x_t] = MEAN + slope (x - m_t)
            slope = a_t * COVARIANCE @ gain
            variance = (1.0 if method == "ddpm" else eta**2) * s_s**2 * (1 - (a_t * s_s / (a_s * s_t)) ** 2)
            ratio = (s_s**2 - variance).sqrt() / s_t
            matrix = (a_s - ratio * a_t) * slope + ratio * EYE
            shift = (a_s - ratio * a_t) * (MEAN - slope @ m_t)
        mean, covariance = matrix @ mean + shift, matrix @ covariance @ matrix.T + variance * EYE
    return mean, covariance


@pytest.mark.parametrize(("method", "eta"), METHODS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_equals_the_affine_recursion(schedule, method, eta):
    """For a Gaussian every step is affine: the moments obey the closed recursion, to rounding."""
    grid = time_grid(schedule, 12, power=2.0)
    ours, expected = sampler_moments(schedule, grid, method, eta), recursion(schedule, grid, method, eta)
    for actual, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("method", "eta"), METHODS)
@pytest.mark.parametrize("schedule", SCHEDULES[:3] + SCHEDULES[4:], ids=lambda s: type(s).__name__)
def test_weak_order_one_and_the_right_limit(schedule, method, eta):
    """Half the step, half the error in mean and covariance; the extrapolated limit is the exact law."""
    # one more denoiser call below this time would measure the last step alone
    end = 0.02
    times = [time_grid(schedule, n) * (1 - end / schedule.t_start) + end for n in (400, 800, 1600)]
    results = [torch.cat([m[:, None], c], 1) for m, c in (recursion(schedule, grid, method, eta) for grid in times)]
    mean, covariance = noised(schedule, times[0][-1])
    exact = torch.cat([mean[:, None], covariance], 1)
    errors = [(result - exact).norm() for result in results]
    assert 1.8 < float(errors[0] / errors[1]) < 2.2
    assert 1.85 < float(errors[1] / errors[2]) < 2.15
    # Richardson: without its first-order term the error vanishes at second order, towards this law alone
    coarse, fine = ((2 * results[i + 1] - results[i] - exact).norm() for i in (0, 1))
    assert 3 < float(coarse / fine) < 5


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize("method", ["euler", "ddpm", "ddim"])
def test_parametrizations_sample_the_same(method, kind):
    """Whole trajectories agree in every parametrisation, for the mean and for the sampled blend."""
    toy = toys.get("ring-of-six")
    for blender in (MeanBlend, SampledBlend):
        runs = [
            sample(
                ExactExperts(toy.prior, toy.rewards, toy.alpha, toy.schedule, language),
                blender(Preference({"east": 0.3, "north": 0.7}, 0.9)),
                64, 20, torch.Generator().manual_seed(0), method=method, eta=0.5,
            )
            for language in ("score", kind)
        ]  # fmt: skip
        torch.testing.assert_close(runs[1], runs[0], rtol=1e-8, atol=1e-8)


def base_p_value(blender, samples=4000, steps=300):
    """Kolmogorov-Smirnov p-value of samples under the base mixture's own distribution function."""
    toy = toys.get("two-modes")
    experts = ExactExperts(toy.prior, toy.rewards, toy.alpha, toy.schedule)
    x = sample(experts, blender, samples, steps, torch.Generator().manual_seed(7), method="euler",
               grid=time_grid(toy.schedule, steps, power=2.0))[:, 0]  # fmt: skip
    components = stats.norm(toy.prior.means[:, 0].numpy(), toy.prior.covariances[:, 0, 0].sqrt().numpy())
    return float(stats.kstest(x.numpy(), lambda q: components.cdf(q[:, None]) @ toy.prior.weights.numpy()).pvalue)


def test_lambda_zero_reproduces_the_prior():
    """At lambda = 0 samples follow the prior (KS at 1e-5); negative control: lambda = 0.2 is told apart."""
    weights = {"right": 1.0, "left": 0.0, "centre": 0.0}
    assert not alarms([base_p_value(blender(Preference(weights, 0.0))) for blender in (MeanBlend, SampledBlend)])
    assert alarms([base_p_value(MeanBlend(Preference(weights, 0.2)))])


@pytest.mark.parametrize("blender", [MeanBlend, SampledBlend, lambda p: SampledBlend(p, "iid")])
def test_samples_do_not_depend_on_their_batch(blender):
    """Given start, phase and noise, chunks and reversed batches give each sample the same result."""
    toy = toys.get("ring-of-six")
    experts = ExactExperts(toy.prior, toy.rewards, toy.alpha, toy.schedule, "eps")
    blend = blender(Preference({"east": 0.3, "north": 0.7}, 0.9))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(15, 40, 2, generator=generator, dtype=torch.float64)
    x_T, phase = noise[0].flip(0), torch.rand(40, generator=generator, dtype=torch.float64)

    def run(rows):
        return sample(experts, blend, len(rows), 15, x_T=x_T[rows], noise=noise[:, rows], phase=phase[rows])

    rows = torch.arange(40)
    together = run(rows)
    torch.testing.assert_close(run(rows.flip(0)).flip(0), together, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat([run(part) for part in rows.split(7)]), together, rtol=1e-9, atol=1e-9)
    assert torch.equal(run(rows), together)


def test_one_hot_trajectories_are_the_expert_bit_for_bit():
    """A one-hot preference samples what that expert alone samples, mean or sampled, bit for bit."""
    toy = toys.get("ring-of-six")
    both = ExactExperts(toy.prior, toy.rewards, toy.alpha, toy.schedule)
    alone = ExactExperts(toy.prior, {"east": toy.rewards["east"]}, toy.alpha, toy.schedule)
    expected = sample(alone, MeanBlend(Preference({"east": 1})), 50, 10, torch.Generator().manual_seed(0))
    for blender in (MeanBlend, SampledBlend):
        blend = blender(Preference({"east": 1, "north": 0}))
        assert torch.equal(sample(both, blend, 50, 10, torch.Generator().manual_seed(0)), expected)


def test_steps_are_announced_in_order():
    """Blenders see index, count, a decreasing grid and one constant phase a sample; progress counts."""
    seen, counted = [], []

    def spy(experts, x, t, step):
        seen.append(step)
        return experts.predict(x, t, ["base"])[0]

    sample(
        gaussian(VPLinear()),
        spy,
        3,
        5,
        torch.Generator().manual_seed(0),
        progress=lambda *k: counted.append(k),
    )
    assert [(step.index, step.count) for step in seen] == [(k, 5) for k in range(5)]
    assert counted == [(k + 1, 5) for k in range(5)]
    assert float(seen[0].t) == 1.0
    assert float(seen[-1].t_next) == VPLinear().t_end
    assert all(before.t_next == after.t for before, after in pairwise(seen))
    assert all(isinstance(step, Step) and torch.equal(step.phase, seen[0].phase) for step in seen)
    assert seen[0].phase.shape == (3,)


class Doubled(MeanBlend):
    """The mean of the experts with twice the sampler's noise, for one method."""

    def require_method(self, method):
        if method != "ddpm":
            raise ValueError(f"for ddpm alone, received {method}")

    def noise(self, z, own_variance, x, step):
        return 2 * own_variance**0.5 * z


def test_any_blender_may_shape_its_noise():
    """A `NoisyBlender` is known by what it can do, not by its class: its noise replaces the sampler's at every step."""
    experts, blend, generator = gaussian(VPLinear()), Doubled(BASE.preference), torch.Generator().manual_seed(0)
    assert isinstance(blend, NoisyBlender)
    assert not isinstance(BASE, NoisyBlender)
    noise = torch.randn(6, 5, 2, generator=generator, dtype=torch.float64)
    start = {"x_T": noise[0], "phase": torch.zeros(5, dtype=torch.float64)}
    got = sample(experts, blend, 5, 6, noise=noise, **start)
    torch.testing.assert_close(got, sample(experts, BASE, 5, 6, noise=2 * noise, **start), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="for ddpm alone, received euler"):
        sample(experts, blend, 5, 6, noise=noise, method="euler", **start)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "heun"}, "method"),
        ({"n": 0}, "n must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"generator": None}, "pass a generator"),
        ({"x_T": torch.zeros(3, 2, dtype=torch.float64)}, "x_T must have shape"),
        ({"noise": torch.zeros(4, 4, 2, dtype=torch.float64)}, "noise must have shape"),
        ({"phase": torch.zeros(3, dtype=torch.float64)}, "phase must have shape"),
        ({"grid": torch.linspace(1, 0, 4)}, "grid must have shape"),
        ({"grid": torch.linspace(0, 1, 6)}, "grid must decrease"),
        ({"grid": torch.linspace(1.5, 0, 6)}, "grid must decrease"),
        ({"x_T": torch.full((4, 2), torch.nan)}, "x_T must be finite"),
        ({"noise": torch.full((5, 4, 2), torch.inf)}, "noise must be finite"),
        ({"phase": torch.full((4,), torch.nan)}, "phase must hold"),
        ({"phase": torch.full((4,), 1.0)}, "phase must hold"),
    ],
)
def test_bad_input(changes, said):
    """Each bad argument is refused with what was expected."""
    arguments = {"n": 4, "steps": 5, "generator": torch.Generator().manual_seed(0)} | changes
    with pytest.raises(ValueError, match=said):
        sample(gaussian(VPLinear()), BASE, **arguments)


def test_no_grid_starts_beyond_the_schedule():
    """Where f and g^2 diverge at 1, a grid that starts there would only be noticed as NaN points."""
    schedule = RectifiedFlow()
    with pytest.raises(ValueError, match="t_start"):
        sample(gaussian(schedule), BASE, 4, 5, torch.Generator(), grid=torch.linspace(1, 0, 6))


@pytest.mark.parametrize("blender", [MeanBlend, SampledBlend])
def test_given_points_are_cast(blender):
    """A start in single precision serves experts in double: what is written into their predictions has one type."""
    toy = toys.get("two-modes")
    experts = ExactExperts(toy.prior, toy.rewards, toy.alpha, toy.schedule)
    blend = blender(Preference({"right": 0.5, "left": 0.3, "centre": 0.2}))
    x = sample(experts, blend, 4, 5, torch.Generator().manual_seed(0), x_T=torch.zeros(4, 1))
    assert x.dtype == torch.float64
    assert bool(x.isfinite().all())


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan"), float("inf")])
def test_an_eta_outside_the_unit_interval_is_refused(eta: float) -> None:
    """Beyond 1 the deterministic part is the root of a negative number, which was found steps later as NaN points."""
    toy = toys.get("two-modes")
    experts = ExactExperts(toy.prior, toy.rewards, toy.alpha, toy.schedule)
    blend = MeanBlend(Preference(dict.fromkeys(toy.rewards, 1 / len(toy.rewards))))
    with pytest.raises(ValueError, match="eta must lie in"):
        sample(experts, blend, 4, 3, torch.Generator().manual_seed(0), method="ddim", eta=eta)
