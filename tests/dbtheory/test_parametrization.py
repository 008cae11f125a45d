"""Conversions between score, noise, data and velocity, against their definitions."""

import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor

from dbtheory.parametrization import Parametrization, convert
from dbtheory.schedule import NoiseSchedule, VPLinear
from tests.dbtheory.strategies import SCHEDULES

KINDS = get_args(Parametrization)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def definitions(schedule: NoiseSchedule, t) -> tuple[Tensor, dict[str, Tensor]]:
    """x_t and what each kind of denoiser says, from one x0 and eps."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, 2, generator=generator, dtype=torch.float64)
    time = torch.as_tensor(t)
    alpha, sigma = (scale.reshape(-1, 1, 1) if time.ndim else scale for scale in (schedule.alpha(t), schedule.sigma(t)))
    outputs = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "score": -eps / sigma}
    return alpha * x0 + sigma * eps, outputs


@each_schedule
@pytest.mark.parametrize("t", [0.4, torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=torch.float64)])
def test_every_pair_follows_the_definitions(schedule: NoiseSchedule, t) -> None:
    """Each of the sixteen conversions gives the target's definition, not merely a round trip."""
    x, outputs = definitions(schedule, t)
    for source, target in itertools.product(KINDS, KINDS):
        got = convert(outputs[source], x, t, schedule, source, target)
        torch.testing.assert_close(got, outputs[target], rtol=1e-9, atol=1e-11)


@each_schedule
def test_blends_agree_in_every_parametrisation(schedule: NoiseSchedule) -> None:
    """Coefficients that sum to 1 commute with every conversion: why blending eps is legitimate."""
    x, t = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 0.3
    scores = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    coefficients = torch.tensor([-0.4, 0.5, 0.9], dtype=torch.float64).reshape(3, 1, 1)
    for kind in KINDS:
        outputs = convert(scores, x, t, schedule, "score", kind)
        blend = convert((coefficients * outputs).sum(0), x, t, schedule, kind, "score")
        torch.testing.assert_close(blend, (coefficients * scores).sum(0), rtol=1e-10, atol=1e-10)


def test_blends_that_do_not_sum_to_one_disagree() -> None:
    """Negative control of the test above."""
    x, score = torch.ones(1, 2).double(), torch.ones(1, 2).double()
    x0 = convert(score, x, 0.3, VPLinear(), "score", "x0")
    assert (convert(0.5 * x0, x, 0.3, VPLinear(), "x0", "score") - 0.5 * score).abs().max() > 0.1


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
        (torch.zeros(2, 3), 0.5, "eps", "flow", "unknown parametrisation 'flow'"),
        (torch.zeros(2, 2), 0.5, "eps", "x0", "shape of x"),
        (torch.zeros(2, 3), 0.0, "eps", "score", "noise, which is zero"),
        (torch.zeros(2, 3), torch.tensor([0.1, 0.2, 0.3]), "eps", "x0", "one value per row"),
    ],
)
def test_bad_input_is_refused(prediction: Tensor, t, source: str, target: str, message: str) -> None:
    """Each error names what was wrong."""
    with pytest.raises(ValueError, match=message):
        convert(prediction, torch.zeros(2, 3), t, VPLinear(), source, target)
