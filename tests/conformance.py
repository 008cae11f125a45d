"""One suite that every `Experts` passes: exact mixtures and diffusers models alike.

Each check takes the experts, points `x (n, *event)` with n >= 3, and a time `t`. `check_all` runs them all.
"""

from typing import get_args

import torch
from torch import Tensor

from dbtheory import MeanBlend, Preference, SampledBlend
from dbtheory.blend import Step
from dbtheory.experts import Experts
from dbtheory.parametrization import Parametrization

# Batches of other shapes run other kernels: equal to rounding, in units of the predictions' own size.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def check_all(experts: Experts, x: Tensor, t: Tensor | float) -> None:
    """Every check below."""
    check_description(experts, x)
    check_shapes(experts, x, t)
    check_order_of_names(experts, x, t)
    check_each_agrees(experts, x, t)
    check_batch_independence(experts, x, t)
    check_one_hot(experts, x, t)
    check_inputs_survive(experts, x, t)
    check_refusals(experts, x, t)


def check_description(experts: Experts, x: Tensor) -> None:
    """Names are distinct and start with "base"; the parametrisation is known; points look as announced."""
    assert experts.names[0] == "base"
    assert len(set(experts.names)) == len(experts.names) >= 2
    assert experts.parametrization in get_args(Parametrization)
    assert tuple(x.shape[1:]) == tuple(experts.event_shape)
    assert x.dtype == experts.dtype
    assert x.device.type == torch.device(experts.device).type


def check_shapes(experts: Experts, x: Tensor, t: Tensor | float) -> None:
    """Predictions are finite, shaped (names, *x.shape) or x.shape, in the dtype of x."""
    together = experts.predict(x, t, list(experts.names))
    each = experts.predict_each(x, t, _round_robin(experts, x))
    assert together.shape == (len(experts.names), *x.shape)
    assert together.dtype == x.dtype
    assert each.shape == x.shape
    assert each.dtype == x.dtype
    assert bool(together.isfinite().all())
    assert bool(each.isfinite().all())


def check_order_of_names(experts: Experts, x: Tensor, t: Tensor | float) -> None:
    """`predict` answers in the order asked, for any subset, and the experts do differ."""
    together = experts.predict(x, t, list(experts.names))
    backwards = experts.predict(x, t, list(experts.names)[::-1])
    _assert_close(backwards.flip(0), together)
    for index, name in enumerate(experts.names):
        _assert_close(experts.predict(x, t, [name])[0], together[index])
    assert not torch.equal(together[0], together[1]), "base and the first expert predict the same"


def check_each_agrees(experts: Experts, x: Tensor, t: Tensor | float) -> None:
    """`predict_each` is `predict`, gathered, for mixed assignments and for one expert alone."""
    together = experts.predict(x, t, list(experts.names))
    mixed = _round_robin(experts, x)
    for assignment in (mixed, mixed.flip(0), torch.zeros_like(mixed)):
        gathered = together[assignment, torch.arange(len(x), device=x.device)]
        _assert_close(experts.predict_each(x, t, assignment), gathered)


def check_batch_independence(experts: Experts, x: Tensor, t: Tensor | float) -> None:
    """A point's prediction does not depend on its neighbours: alone, reversed and chunked give the same."""
    names, assignment = list(experts.names), _round_robin(experts, x)
    together, each = experts.predict(x, t, names), experts.predict_each(x, t, assignment)
    _assert_close(experts.predict(x.flip(0), t, names).flip(1), together)
    _assert_close(experts.predict_each(x.flip(0), t, assignment.flip(0)).flip(0), each)
    alone = [experts.predict(x[i : i + 1], t, names) for i in range(len(x))]
    _assert_close(torch.cat(alone, dim=1), together)
    chunks = [slice(0, 2), slice(2, len(x))]
    _assert_close(torch.cat([experts.predict_each(x[c], t, assignment[c]) for c in chunks]), each)


def check_one_hot(experts: Experts, x: Tensor, t: Tensor | float) -> None:
    """A one-hot preference, and lambda = 0, are the single expert bit for bit, mean or sampled."""
    step = Step(0, 10, t, 0.0, torch.linspace(0.0, 0.9, len(x), dtype=torch.float64))
    for winner in experts.names:
        weights = {name: float(name == winner) for name in experts.names[1:]}
        if winner == "base":
            weights[experts.names[1]] = 1.0
        preference = Preference(weights, kl_scale=float(winner != "base"))
        single = experts.predict(x, t, [winner])[0]
        assert torch.equal(MeanBlend(preference)(experts, x, t, step), single), f"MeanBlend differs on {winner}"
        assert torch.equal(SampledBlend(preference)(experts, x, t, step), single), f"SampledBlend differs on {winner}"


def check_inputs_survive(experts: Experts, x: Tensor, t: Tensor | float) -> None:
    """Predictions do not write into their input."""
    before = x.clone()
    experts.predict(x, t, list(experts.names))
    experts.predict_each(x, t, _round_robin(experts, x))
    assert torch.equal(x, before)


def check_refusals(experts: Experts, x: Tensor, t: Tensor | float) -> None:
    """An unknown name and an assignment out of range are ValueErrors."""
    out_of_range = torch.full((len(x),), len(experts.names), dtype=torch.int64, device=x.device)
    for call in (
        lambda: experts.predict(x, t, ["no such expert"]),
        lambda: experts.predict_each(x, t, out_of_range),
        lambda: experts.predict_each(x, t, -1 - 0 * out_of_range),
    ):
        try:
            call()
        except ValueError:
            continue
        raise AssertionError("bad input was accepted")


def _round_robin(experts: Experts, x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device) % len(experts.names)


def _assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    error = (actual - expected).abs().max() / expected.abs().max().clamp_min(1.0)
    assert error <= TOLERANCE[expected.dtype], f"relative error {error:.2e} in {expected.dtype}"
