"""Schedules against autograd, high precision and diffusers."""

import math

import mpmath
import pytest
import torch
from scipy.interpolate import CubicSpline

from dbtheory import VPTabulated
from dbtheory.schedule import VE, NoiseSchedule, RectifiedFlow, VPCosine, VPDiscrete, VPLinear, expand_like
from tests.dbtheory.strategies import SCHEDULES

# the betas of Ho et al. (2020): 1e-4 to 0.02
HO = VPTabulated(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().log1p().cumsum(0).exp())
each_schedule = pytest.mark.parametrize("schedule", [*SCHEDULES, HO], ids=lambda s: type(s).__name__)
variance_preserving = pytest.mark.parametrize(
    "schedule", [VPLinear(), VPCosine(), VPDiscrete(), HO], ids=lambda s: type(s).__name__
)


def times(schedule: NoiseSchedule, count: int = 997) -> torch.Tensor:
    return torch.linspace(1e-3, schedule.t_start, count, dtype=torch.float64)


def derivative(function, t: torch.Tensor) -> torch.Tensor:
    t = t.clone().requires_grad_(True)
    return torch.autograd.grad(function(t).sum(), t)[0]


@each_schedule
def test_drift_rate_is_the_derivative_of_log_alpha(schedule: NoiseSchedule) -> None:
    """f = (log alpha)', the first half of the SDE that has these marginals."""
    t = times(schedule)
    torch.testing.assert_close(schedule.drift_rate(t), derivative(schedule.log_alpha, t), rtol=1e-9, atol=1e-12)


@each_schedule
def test_diffusion_makes_up_the_variance(schedule: NoiseSchedule) -> None:
    """g^2 = (sigma^2)' - 2 f sigma^2, the second half; sigma^2 differentiated by autograd."""
    t = times(schedule)
    expected = derivative(schedule.variance, t) - 2 * schedule.drift_rate(t) * schedule.variance(t)
    torch.testing.assert_close(schedule.diffusion_squared(t), expected, rtol=1e-8, atol=1e-12)


@each_schedule
def test_scales_agree_with_their_logarithm_and_square(schedule: NoiseSchedule) -> None:
    """alpha = exp(log_alpha) and sigma = sqrt(variance), also where a subclass writes them apart."""
    t = times(schedule)
    torch.testing.assert_close(schedule.alpha(t).log(), schedule.log_alpha(t), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(schedule.sigma(t).square(), schedule.variance(t), rtol=1e-13, atol=0)


@each_schedule
def test_time_runs_from_data_to_noise(schedule: NoiseSchedule) -> None:
    """x_0 is the data itself, and the signal-to-noise ratio falls at every step."""
    assert schedule.alpha(0.0) == 1
    assert schedule.variance(0.0) == 0
    ratio = 2 * schedule.log_alpha(times(schedule)) - schedule.variance(times(schedule)).log()
    assert (ratio.diff() < 0).all()


@variance_preserving
def test_variance_is_preserved(schedule: NoiseSchedule) -> None:
    """alpha^2 + sigma^2 = 1."""
    t = times(schedule)
    total = schedule.alpha(t).square() + schedule.sigma(t).square()
    torch.testing.assert_close(total, torch.ones_like(t), rtol=1e-14, atol=0)


def test_linear_beta_is_integrated() -> None:
    """alpha(t) = exp(-1/2 int_0^t beta) with beta linear, by adaptive quadrature."""
    schedule = VPLinear(0.1, 20.0)
    integral = mpmath.quad(lambda s: 0.1 + s * 19.9, [0, 0.37])
    assert schedule.alpha(0.37).item() == pytest.approx(float(mpmath.exp(-integral / 2)), rel=1e-14)


def reference_variance(schedule: NoiseSchedule, t: float) -> mpmath.mpf:
    """sigma^2 at 50 digits, from the schedule's definition."""
    time = mpmath.mpf(t)
    match schedule:
        case VPLinear(low, high):
            return 1 - mpmath.exp(-(mpmath.mpf(low) * time + (mpmath.mpf(high) - low) * time**2 / 2))
        case VPCosine(offset):
            rate = mpmath.pi / 2 / (1 + mpmath.mpf(offset))
            return 1 - (mpmath.cos(rate * (time + offset)) / mpmath.cos(rate * mpmath.mpf(offset))) ** 2
        case VE(low, high):
            return mpmath.mpf(low) ** 2 * ((mpmath.mpf(high) / mpmath.mpf(low)) ** (2 * time) - 1)
        case RectifiedFlow():
            return time**2
    raise AssertionError(schedule)


@pytest.mark.parametrize("t", [1e-9, 1e-5, 0.3])
@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(), VE(), RectifiedFlow()])
def test_variance_keeps_its_digits_near_the_data(schedule: NoiseSchedule, t: float) -> None:
    """1 - alpha^2 would lose every digit at t = 1e-9; compared with 50-digit arithmetic."""
    with mpmath.workdps(50):
        expected = float(reference_variance(schedule, t))
    assert schedule.variance(t).item() == pytest.approx(expected, rel=1e-13)


def test_discrete_schedule_equals_its_product() -> None:
    """alpha^2 at t = k/count is the product of 1 - beta_j over j = 1..k, in 50 digits, also near the data."""
    schedule = VPDiscrete(count=100)
    low, high = mpmath.sqrt(mpmath.mpf(0.00085)), mpmath.sqrt(mpmath.mpf(0.012))
    product = mpmath.mpf(1)
    for k in range(1, 101):
        product *= 1 - (low + (high - low) * (k - 1) / 99) ** 2
        assert schedule.variance(k / 100).item() == pytest.approx(float(1 - product), rel=1e-12)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_discrete_schedule_equals_diffusers(name: str) -> None:
    """All thousand alphas_cumprod of diffusers' scaled linear schedule; theirs are float32 products."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000
    )
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    # The float32 products carry about 1e-6.
    torch.testing.assert_close(VPDiscrete().alpha(t).square(), scheduler.alphas_cumprod.double(), rtol=2e-6, atol=0)


def test_discrete_schedule_is_smooth_between_its_points() -> None:
    """The spline adds no wiggle: beta between the points stays within the betas of its neighbours."""
    beta = VPDiscrete().diffusion_squared(torch.linspace(0, 1, 10_001, dtype=torch.float64))
    assert (beta.diff() > 0).all()
    assert 0.8 < beta[0] < 0.9
    assert 12.0 < beta[-1] < 12.2


def points_of(count: int) -> torch.Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64) / count


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_table_passes_through_diffusers_alphas(name: str, beta_schedule: str, rescale: bool) -> None:
    """alpha^2 at (i + 1)/count is diffusers' entry i for each of its schedules, up to a terminal zero.

    Its thousand rescaled entries fall below 2^-24 before the last, where Euler's 2^-24 would rise again.
    """
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(beta_schedule=beta_schedule, rescale_betas_zero_snr=rescale)
    table = scheduler.alphas_cumprod.double()
    alpha_squared = VPTabulated(scheduler.alphas_cumprod).alpha(points_of(1000)).square()
    torch.testing.assert_close(alpha_squared[:-1], table[:-1], rtol=1e-12, atol=0)
    assert float(alpha_squared[-1]) == pytest.approx(float(min(table[-2], 2**-24) if rescale else table[-1]), rel=1e-12)
    assert not rescale or table[-1] in (0, 2**-24)


def test_table_of_a_smooth_schedule_is_that_schedule() -> None:
    """From 1000 values of VPDiscrete alone, the curve between them comes back, and the betas.

    At second order, on VPLinear: a quarter of the error with twice the values.
    """
    t = torch.linspace(0, 1, 7919, dtype=torch.float64)
    exact = VPDiscrete()
    table = VPTabulated(exact.alpha(points_of(1000)).square())
    torch.testing.assert_close(table.log_alpha(t), exact.log_alpha(t), rtol=0, atol=1e-9)
    torch.testing.assert_close(table.diffusion_squared(t), exact.diffusion_squared(t), rtol=1e-5, atol=0)
    linear, inside = VPLinear(), t[t > 0.05]
    tables = [VPTabulated(linear.alpha(points_of(count)).square()) for count in (500, 1000)]
    coarse, fine = ((s.diffusion_squared(inside) - linear.diffusion_squared(inside)).abs().max() for s in tables)
    assert 3 < float(coarse / fine) < 5


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("count", [100, 1000])
def test_betas_that_jump_leave_no_negative_beta(beta_schedule: str, count: int) -> None:
    """g^2 < 0 has no SDE. Control: an ordinary spline has it where linear betas are rescaled to a terminal zero."""
    diffusers = pytest.importorskip("diffusers")
    table = diffusers.DDIMScheduler(count, beta_schedule=beta_schedule, rescale_betas_zero_snr=True).alphas_cumprod
    schedule, t = VPTabulated(table), torch.linspace(0, 1, 100 * count + 1, dtype=torch.float64)
    assert float(schedule.diffusion_squared(t).min()) >= 0
    assert float(schedule.log_alpha(t).diff().max()) <= 1e-14
    if beta_schedule != "squaredcos_cap_v2":
        knots = torch.arange(count + 1, dtype=torch.float64) / count
        spline = CubicSpline(knots.numpy(), schedule.log_alpha(knots).numpy())
        assert spline(t.numpy(), 1).max() > 1e-3


def test_zero_terminal_signal_is_finite() -> None:
    """Where a table ends in 0, f, g^2 and the noise at t = 1 are finite, and generation starts there."""
    for last in (0.0, 2**-24):
        schedule = VPTabulated(torch.tensor([0.9, 0.5, 0.1, last]))
        assert schedule.t_start == 1
        for value in (schedule.drift_rate(1.0), schedule.diffusion_squared(1.0), schedule.log_alpha(1.0)):
            assert math.isfinite(float(value))
        assert float(schedule.alpha(1.0)) == pytest.approx(2**-12, rel=1e-12)


def test_table_keeps_its_own_numbers() -> None:
    """The scheduler's tensor may change later: the schedule does not, and leaves it alone."""
    table = torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)
    schedule = VPTabulated(table)
    before = schedule.alpha(0.6)
    assert table.tolist() == [0.9, 0.5, 0.0]
    table.fill_(0.3)
    assert schedule.alpha(0.6) == before
    assert "count=3" in repr(schedule)


@each_schedule
def test_float_tensor_and_dtype(schedule: NoiseSchedule) -> None:
    """Floats give float64, tensors keep their shape and dtype, and float32 agrees to its precision."""
    t = times(schedule, 12).reshape(3, 4)
    for method in ("alpha", "sigma", "log_alpha", "variance", "drift_rate", "diffusion_squared"):
        function = getattr(schedule, method)
        assert function(0.5).dtype == torch.float64
        assert function(0.5).shape == ()
        assert function(t.float()).dtype == torch.float32
        torch.testing.assert_close(function(t.float()), function(t).float(), rtol=2e-3, atol=1e-6)


@each_schedule
def test_generation_starts_from_noise_with_finite_drift(schedule: NoiseSchedule) -> None:
    """At t_start f and g^2 are finite; the data's share of the variance is below one per cent."""
    t = schedule.t_start
    assert math.isfinite(schedule.drift_rate(t).item())
    assert math.isfinite(schedule.diffusion_squared(t).item())
    assert schedule.alpha(t) ** 2 / schedule.variance(t) <= 0.0101
    assert schedule.t_end == 0


@each_schedule
@pytest.mark.parametrize("t", [-0.1, 1.5, float("nan"), torch.tensor([0.5, 2.0])])
def test_times_outside_the_unit_interval_are_refused(schedule: NoiseSchedule, t) -> None:
    """A step index passed as a time, or NaN, is an error and not a silent NaN."""
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        schedule.alpha(t)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VPLinear(beta_min=-1.0),
        lambda: VPLinear(beta_min=3.0, beta_max=2.0),
        lambda: VPLinear(beta_max=math.nan),
        lambda: VPCosine(offset=-0.1),
        lambda: VPDiscrete(beta_end=1.5),
        lambda: VPDiscrete(count=1),
        lambda: VPTabulated(torch.tensor([0.9])),
        lambda: VPTabulated(torch.empty(0)),
        lambda: VPTabulated(torch.tensor([1.0, 0.5])),
        lambda: VPTabulated(torch.tensor([0.9, 0.95, 0.5])),
        lambda: VPTabulated(torch.tensor([0.9, 0.0, 0.0])),
        lambda: VPTabulated(torch.tensor([0.9, -0.1])),
        lambda: VPTabulated(torch.tensor([0.9, math.nan, 0.5])),
        lambda: VPTabulated(torch.tensor([0.9, math.nan])),
        lambda: VE(sigma_min=0.0),
        lambda: VE(sigma_min=1.0, sigma_max=1.0),
    ],
)
def test_impossible_parameters_are_refused(make) -> None:
    """Each constructor names the parameter that makes no schedule."""
    with pytest.raises(ValueError, match="got"):
        make()


def test_times_per_row_must_match_the_rows() -> None:
    """One value for each row of x, or one for all; anything else would broadcast silently."""
    x = torch.zeros(3, 2, dtype=torch.float64)
    assert expand_like(torch.tensor(2.0), x).shape == ()
    assert expand_like(torch.arange(3), x).shape == (3, 1)
    with pytest.raises(ValueError, match="one value per row"):
        expand_like(torch.arange(2), x)
