"""LoraExperts pass the suite that every Experts passes."""

from pathlib import Path

import pytest
import torch

from dbtheory import Preference
from scale import attach
from scale.experts import LoraExperts, tile
from tests.conformance import check_all
from tests.scale import tiny


@pytest.fixture(params=["sd", "sdxl"])
def experts(request: pytest.FixtureRequest, tmp_path: Path) -> LoraExperts:
    """The experts that a blend sees inside a pipeline call, bound to random conditioning of three rows."""
    make = getattr(tiny, request.param)
    files = {
        "first": tiny.save_lora(make, tmp_path / "1", 1),
        "second": tiny.save_lora(make, tmp_path / "2", 2, tiny.MIXED),
    }
    pipe = make()
    hook = attach(pipe, files, Preference({"first": 0.5, "second": 0.5}))._hook
    forward = hook.fn_ref.original_forward
    assert forward is not None
    generator = torch.Generator().manual_seed(0)
    width = pipe.unet.config.cross_attention_dim
    # one row of conditioning for all points: the suite cuts batches, which must not change what a point sees
    conditioning = {"encoder_hidden_states": torch.randn(1, 5, width, generator=generator)}

    def broadcast(x: torch.Tensor, t: torch.Tensor, **given):
        states = given.pop("encoder_hidden_states").expand(len(x), -1, -1)
        if request.param == "sdxl":
            given["added_cond_kwargs"] = {"text_embeds": torch.ones(len(x), 16), "time_ids": torch.ones(len(x), 6)}
        return forward(x, t, encoder_hidden_states=states, **given)

    return LoraExperts(pipe, hook.names, hook.switch, broadcast).bind(**conditioning)


def test_conformance(experts: LoraExperts) -> None:
    """Shapes, order, agreement of predict and predict_each, independence of the batch, one-hot bit for bit."""
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        check_all(experts, x, torch.tensor(501))


def test_description_follows_the_scheduler(experts: LoraExperts) -> None:
    """The parametrisation is the scheduler's prediction type, the schedule its betas."""
    assert experts.parametrization == "eps"
    scheduler = experts.pipe.scheduler
    for index in (0, 499, 999):
        squared = experts.schedule.alpha((index + 1) / 1000) ** 2
        assert float(squared) == pytest.approx(float(scheduler.alphas_cumprod[index]), rel=1e-5)
    scheduler.register_to_config(prediction_type="v_prediction", beta_schedule="linear")
    assert experts.parametrization == "v"
    with pytest.raises(ValueError, match="scaled-linear"):
        _ = experts.schedule


def test_tile_repeats_rows_wherever_they_are() -> None:
    """Tensors of n rows inside dicts and tuples are repeated m times; scalars, other sizes and position ids are not."""
    rows, other, ids = torch.arange(6.0).view(2, 3), torch.ones(5, 3), torch.ones(2, 3)
    value = {"a": rows, "b": (rows, None), "c": {"d": other}, "img_ids": ids, "e": "text", "t": torch.tensor(3)}
    tiled = tile(value, n=2, m=3)
    assert torch.equal(tiled["a"], torch.cat([rows] * 3))
    assert tiled["b"][0].shape == (6, 3)
    assert tiled["b"][1] is None
    assert tiled["c"]["d"] is other
    assert tiled["img_ids"] is ids
    assert tiled["e"] == "text"
    assert tiled["t"].ndim == 0
    assert tile(value, n=2, m=1) is value
