"""The ledger: rows through the denoiser of every family, under guidance and blends; memory; and no trace of it left."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dbtheory import Preference
from scale import attach
from scale.baselines import Ledger, metered
from scale.pipeline import Picture, draw
from tests.scale import tiny

PICTURES = [Picture("a red circle", 0, 3), Picture("a blue star", 1, 4)]
STEPS = 2


def rows(pipe: Any, guidance: float = 1.0) -> int:
    with metered(pipe) as spent:
        list(draw(pipe, PICTURES, steps=STEPS, guidance=guidance))
    assert spent.seconds > 0
    assert spent.peak_memory >= 0
    assert (spent.reward_calls, spent.gradients) == (0, 0)
    return spent.evaluations


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.sd3, tiny.flux])
def test_rows_of_every_family(make: Callable[[], Any]) -> None:
    """Images x steps; twice that under classifier-free guidance, which Flux has none of."""
    pipe = make()
    assert rows(pipe) == len(PICTURES) * STEPS
    assert rows(pipe, 3.0) == len(PICTURES) * STEPS * (1 if make is tiny.flux else 2)


@pytest.mark.parametrize("make", [tiny.sd, tiny.sd3])
def test_blends_cost_their_experts(make: Callable[[], Any], tmp_path: Path) -> None:
    """mpa with two adapters is twice the base, also in small batches, mpa-ls and rs are once; guidance doubles."""
    targets = tiny.LINEAR if make is tiny.sd else tiny.MMDIT
    files = {name: tiny.save_lora(make, tmp_path / name, seed, targets) for seed, name in enumerate(("a", "b"))}
    for method, cost, options in (
        ("mpa", 2, {}), ("mpa", 2, {"max_batch": 1}), ("mpa-ls", 1, {}), ("rs", 1, {}),
    ):  # fmt: skip
        pipe = make()
        knob = attach(pipe, files, Preference({"a": 0.4, "b": 0.6}), method, **options)
        assert rows(pipe) == cost * len(PICTURES) * STEPS
        assert rows(pipe, 3.0) == 2 * cost * len(PICTURES) * STEPS
        if method == "mpa":
            knob.preference = Preference({"a": 0.4, "b": 0.6}, kl_scale=1.2)
            assert rows(pipe) == 3 * len(PICTURES) * STEPS  # the base too
        knob.detach()
        assert rows(pipe) == len(PICTURES) * STEPS


def test_it_removes_itself() -> None:
    """After the block, also after an exception, nothing counts any more, and the seconds are there."""
    pipe = tiny.sd()

    def stop(done: int) -> None:
        raise RuntimeError("stop")

    meter = metered(pipe)
    with pytest.raises(RuntimeError, match="stop"), meter as spent:
        list(draw(pipe, PICTURES, steps=STEPS, guidance=1.0, advance=stop))
    assert spent.evaluations == len(PICTURES) * STEPS
    assert spent.seconds > 0
    assert not pipe.unet.conv_in._forward_pre_hooks
    list(draw(pipe, PICTURES, steps=STEPS, guidance=1.0))
    assert spent.evaluations == len(PICTURES) * STEPS


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's memory is counted instead")
def test_memory_is_what_was_held_at_once() -> None:
    """A peak that is gone when the block ends counts, and one from before it does not."""
    mega = 2**20
    pipe, before = tiny.sd(), torch.ones(300 * mega // 4)
    del before
    with metered(pipe) as spent:
        held = torch.ones(200 * mega // 4)
        del held
    assert 150 * mega < spent.peak_memory < 290 * mega
    with metered(pipe) as spent:
        pass
    assert spent.peak_memory < 50 * mega


def test_what_cannot_be_counted_is_refused() -> None:
    """A compiled denoiser, whose graph holds no hook; a denoiser whose first layer has an unknown name."""
    pipe = tiny.sd()
    pipe.unet.compile()
    with pytest.raises(ValueError, match=r"without torch\.compile"), metered(pipe):
        pass
    pipe = tiny.sd()
    pipe.unet = torch.compile(pipe.unet)
    with pytest.raises(ValueError, match=r"without torch\.compile"), metered(pipe):
        pass
    pipe = tiny.sd()
    pipe.register_modules(unet=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="Linear has none of conv_in"), metered(pipe):
        pass


def test_an_empty_ledger() -> None:
    """All zeros."""
    assert Ledger() == Ledger(0, 0, 0, 0.0, 0)
