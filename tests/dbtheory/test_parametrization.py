"""Conversions between score, noise, data and velocity, against their definitions."""

import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor

import toys
from dbtheory import ExactExperts
from dbtheory.parametrization import Parametrization, convert
from dbtheory.schedule import NoiseSchedule, RectifiedFlow, VPLinear, VPTabulated
from tests import conformance
from tests.dbtheory.strategies import SCHEDULES

KINDS = get_args(Parametrization)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def kinds_of(schedule: NoiseSchedule) -> list[str]:
    """Only a straight path has a flow velocity."""
    return [kind for kind in KINDS if kind != "flow" or isinstance(schedule, RectifiedFlow)]


def definitions(schedule: NoiseSchedule, t) -> tuple[Tensor, dict[str, Tensor]]:
    """x_t and what each kind of denoiser says, from one x0 and eps."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, 2, generator=generator, dtype=torch.float64)
    time = torch.as_tensor(t)
    alpha, sigma = (scale.reshape(-1, 1, 1) if time.ndim else scale for scale in (schedule.alpha(t), schedule.sigma(t)))
    outputs = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0, "score": -eps / sigma}
    return alpha * x0 + sigma * eps, outputs


@each_schedule
@pytest.mark.parametrize("t", [0.4, torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=torch.float64)])
def test_every_pair_follows_the_definitions(schedule: NoiseSchedule, t) -> None:
    """Each conversion, sixteen or on a straight path 25, gives the target's definition, not merely a round trip."""
    x, outputs = definitions(schedule, t)
    for source, target in itertools.product(kinds_of(schedule), repeat=2):
        got = convert(outputs[source], x, t, schedule, source, target)
        torch.testing.assert_close(got, outputs[target], rtol=1e-9, atol=1e-11)


@each_schedule
def test_blends_agree_in_every_parametrisation(schedule: NoiseSchedule) -> None:
    """Coefficients that sum to 1 commute with every conversion: why blending eps is legitimate."""
    x, t = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 0.3
    scores = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    coefficients = torch.tensor([-0.4, 0.5, 0.9], dtype=torch.float64).reshape(3, 1, 1)
    for kind in kinds_of(schedule):
        outputs = convert(scores, x, t, schedule, "score", kind)
        blend = convert((coefficients * outputs).sum(0), x, t, schedule, kind, "score")
        torch.testing.assert_close(blend, (coefficients * scores).sum(0), rtol=1e-10, atol=1e-10)


def test_blends_that_do_not_sum_to_one_disagree() -> None:
    """Negative control of the test above."""
    x, score = torch.ones(1, 2).double(), torch.ones(1, 2).double()
    x0 = convert(score, x, 0.3, VPLinear(), "score", "x0")
    assert (convert(0.5 * x0, x, 0.3, VPLinear(), "x0", "score") - 0.5 * score).abs().max() > 0.1


def test_flow_is_the_velocity_of_the_path() -> None:
    """u = d x_t/dt at fixed data and noise, by autograd of `alpha(t) x0 + sigma(t) eps`."""
    schedule = RectifiedFlow()
    x0, eps = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in (0.05, 0.5, 0.99):
        time = torch.tensor(t, dtype=torch.float64)
        path = torch.func.jacfwd(lambda s: schedule.alpha(s) * x0 + schedule.sigma(s) * eps)
        x = schedule.alpha(time) * x0 + schedule.sigma(time) * eps
        torch.testing.assert_close(convert(eps, x, t, schedule, "eps", "flow"), path(time), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flow_is_finite_at_both_ends(dtype: torch.dtype) -> None:
    """At t = 1 a velocity has every other form (x is the noise), at t = 0 all but the score; noise alone has none."""
    schedule, ends = RectifiedFlow(), torch.ones(2, 3, dtype=dtype)
    x, u = 3 * ends, 5 * ends
    for target, value in {"eps": 3.0, "x0": -2.0, "v": 2.0, "score": -3.0}.items():
        torch.testing.assert_close(convert(u, x, 1.0, schedule, "flow", target), value * ends)
    torch.testing.assert_close(convert(ends, x, 1.0, schedule, "x0", "flow"), 2 * ends)
    torch.testing.assert_close(convert(ends, x, 1.0, schedule, "v", "flow"), 4 * ends)
    for target, value in {"eps": 8.0, "x0": 3.0, "v": 8.0}.items():
        torch.testing.assert_close(convert(u, x, 0.0, schedule, "flow", target), value * ends)
    for t, source, target in [
        (1.0, "eps", "flow"),
        (1.0, "score", "flow"),
        (0.0, "x0", "flow"),
        (0.0, "flow", "score"),
    ]:
        with pytest.raises(ValueError, match="which is zero"):
            convert(ends, x, t, schedule, source, target)


@each_schedule
def test_flow_belongs_to_straight_paths(schedule: NoiseSchedule) -> None:
    """RectifiedFlow is straight at every time to rounding, in both precisions; the others bend, and say so."""
    t = torch.linspace(0.01, 0.99, 997, dtype=torch.float64)
    for times in (t, t.float()):
        x = torch.ones(len(times), 2, dtype=times.dtype)
        if isinstance(schedule, RectifiedFlow):
            assert bool(convert(x, x, times, schedule, "flow", "eps").isfinite().all())
        else:
            with pytest.raises(ValueError, match=f"straight path.*{type(schedule).__name__}"):
                convert(x, x, times, schedule, "flow", "eps")


def test_exact_experts_in_flow_pass_the_shared_suite() -> None:
    """A toy's experts as SD3 and Flux give theirs: velocities under RectifiedFlow; under VP an error, no number."""
    toy = toys.get("ring-of-six")
    experts = ExactExperts(toy.prior, toy.rewards, toy.alpha, RectifiedFlow(), "flow")
    x = 2 * torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # a closed form gives the score, whose rounding counts 1/alpha times in a velocity
    for t in (1e-3, 0.4, 1 - 1e-4):
        conformance.check_all(experts, x, t)
    bent = ExactExperts(toy.prior, toy.rewards, toy.alpha, VPTabulated(torch.tensor([0.9, 0.1])), "flow")
    with pytest.raises(ValueError, match="straight path"):
        bent.predict(x, 0.4, ["base"])


def test_equal_kinds_return_the_prediction_itself() -> None:
    """One-hot blends are bit for bit the expert: no arithmetic may touch them."""
    prediction = torch.randn(2, 3)
    assert convert(prediction, torch.zeros(2, 3), 0.5, VPLinear(), "eps", "eps") is prediction


def test_float32_stays_float32() -> None:
    """Schedules are evaluated in float64, and images are not promoted by them."""
    got = convert(torch.ones(2, 3), torch.ones(2, 3), 0.5, VPLinear(), "eps", "x0")
    assert got.dtype == torch.float32


@pytest.mark.parametrize(
    ("prediction", "t", "source", "target", "message"),
    [
        (torch.zeros(2, 3), 0.5, "epsilon", "x0", "unknown parametrisation 'epsilon'"),
        (torch.zeros(2, 3), 0.5, "eps", "velocity", "unknown parametrisation 'velocity'"),
        (torch.zeros(2, 3), 0.5, "eps", "flow", "straight path"),
        (torch.zeros(2, 3), 0.5, "flow", "eps", "straight path"),
        (torch.zeros(2, 2), 0.5, "eps", "x0", "shape of x"),
        (torch.zeros(2, 3), 0.0, "eps", "score", "noise, which is zero"),
        (torch.zeros(2, 3), torch.tensor([0.1, 0.2, 0.3]), "eps", "x0", "one value per row"),
    ],
)
def test_bad_input_is_refused(prediction: Tensor, t, source: str, target: str, message: str) -> None:
    """Each error names what was wrong."""
    with pytest.raises(ValueError, match=message):
        convert(prediction, torch.zeros(2, 3), t, VPLinear(), source, target)
