"""The one-step maps of generation, against conditioning, diffusers and the equation itself."""

import pytest
import torch

from dbtheory import VE, RectifiedFlow, VPCosine, VPDiscrete, VPLinear
from dbtheory.parametrization import convert
from dbtheory.steps import (
    METHODS,
    advance,
    ddim_step,
    ddpm_step,
    euler_maruyama_step,
    posterior_gain,
    posterior_variance,
    step_variance,
)

SCHEDULES = [VPLinear(), VPCosine(), VPDiscrete(), VE(), RectifiedFlow()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_ddpm_is_ddim_with_eta_one(schedule):
    """DDIM at eta = 1 is the ancestral sampler, under every schedule, step by step."""
    x, x0, noise = torch.randn(3, 50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t, s in [(0.9, 0.6), (0.5, 0.45), (0.1, 0.0)]:
        ancestral = ddpm_step(x, x0, t, s, noise, schedule)
        implicit = ddim_step(x, x0, t, s, noise, schedule, eta=1.0)
        torch.testing.assert_close(ancestral, implicit, rtol=1e-11, atol=1e-11)


def test_posterior_against_conditioning():
    """Ancestral variance and gain are those of conditioning x_s on x_t in the joint Gaussian law given x_0."""
    for schedule in SCHEDULES:
        for t, s in [(0.9, 0.6), (0.5, 0.45), (0.1, 0.01)]:
            link = schedule.alpha(t) / schedule.alpha(s)
            var_s, var_t = schedule.sigma(s) ** 2, schedule.sigma(t) ** 2
            regression = link * var_s / var_t
            torch.testing.assert_close(
                posterior_variance(schedule, t, s), var_s - regression * link * var_s, rtol=1e-9, atol=0.0
            )
            gain = schedule.alpha(s) - regression * schedule.alpha(t)
            torch.testing.assert_close(posterior_gain(schedule, t, s), gain, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize(
    ("method", "eta"), [("euler", 1.0), ("ddpm", 0.3), ("ddim", 0.0), ("ddim", 0.3), ("ddim", 1.0)]
)
def test_step_variance_is_what_the_step_adds(method, eta):
    """A unit of noise moves each method's step by the root of its stated variance."""
    x, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for schedule in SCHEDULES:
        for t, s in [(0.9, 0.6), (0.1, 0.0)]:
            step = {"euler": euler_maruyama_step, "ddpm": ddpm_step, "ddim": lambda *a: ddim_step(*a, eta)}[method]
            moved = step(x, one, t, s, one, schedule) - step(x, one, t, s, 0 * one, schedule)
            expected = step_variance(method, schedule, t, s, eta).sqrt()
            torch.testing.assert_close(moved.squeeze(), expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "score"])
def test_advance_is_the_step_of_that_name(kind):
    """Every method by name, from a prediction of every kind, is its own step from the kind that it takes."""
    schedule, t, s = VPCosine(), 0.6, 0.5
    x, x0, noise = torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    score, prediction = (convert(x0, x, t, schedule, "x0", target) for target in ("score", kind))
    expected = {
        "euler": euler_maruyama_step(x, score, t, s, noise, schedule),
        "ddpm": ddpm_step(x, x0, t, s, noise, schedule),
        "ddim": ddim_step(x, x0, t, s, noise, schedule, 0.3),
    }
    assert set(expected) == set(METHODS)
    for method, moved in expected.items():
        got = advance(method, x, prediction, t, s, noise, schedule, source=kind, eta=0.3)
        torch.testing.assert_close(got, moved, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_against_diffusers(eta, kind):
    """On the same tensors a DDIM step is diffusers' own, at every step of its schedule."""
    diffusers = pytest.importorskip("diffusers")
    prediction_type = {"eps": "epsilon", "v": "v_prediction"}[kind]
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=True, prediction_type=prediction_type,
    )  # fmt: skip
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(20)
    schedule = VPDiscrete()
    x, prediction, noise = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for index in scheduler.timesteps.tolist():
        theirs = scheduler.step(prediction, index, x, eta=eta, variance_noise=noise).prev_sample
        # diffusers' index i is our time (i + 1)/1000, and what lies before index 0 is the data
        t, s = (index + 1) / 1000, max(index - 50 + 1, 0) / 1000
        x0 = convert(prediction, x, t, schedule, kind, "x0")
        # diffusers makes its betas in float32
        torch.testing.assert_close(ddim_step(x, x0, t, s, noise, schedule, eta), theirs, rtol=1e-5, atol=1e-5)


def test_euler_step_reads_like_its_equation():
    """`x - (f x - g^2 score) h + g sqrt(h) z` at h > 0, by hand for one scalar."""
    schedule = VPLinear()
    beta, h = 0.1 + 0.5 * 19.9, 0.1
    x, score, z = (torch.tensor([[v]], dtype=torch.float64) for v in (1.5, -0.7, 0.3))
    expected = 1.5 - (-0.5 * beta * 1.5 - beta * -0.7) * h + (beta * h) ** 0.5 * 0.3
    assert float(euler_maruyama_step(x, score, 0.5, 0.4, z, schedule)) == pytest.approx(expected, rel=1e-12)
