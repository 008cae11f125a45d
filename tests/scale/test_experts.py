"""LoraExperts pass the suite that every Experts passes, and drive the core's own sampler."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dbtheory import MeanBlend, Preference, sample
from scale import attach
from scale.experts import LoraExperts, tile
from tests.conformance import check_all
from tests.scale import tiny

HALF = Preference({"first": 0.5, "second": 0.5})


def attached(family: str, folder: Path):
    """A tiny pipeline and the knob of two adapters on it."""
    make = getattr(tiny, family)
    targets = tiny.MIXED if family in ("sd", "sdxl") else ("to_k", "ff.net.2")
    files = {
        "first": tiny.save_lora(make, folder / "1", 1),
        "second": tiny.save_lora(make, folder / "2", 2, targets, rank=3),
    }
    pipe = make()
    return pipe, attach(pipe, files, HALF)


@pytest.fixture(params=["sd", "sdxl", "sd3"])
def experts(request: pytest.FixtureRequest, tmp_path: Path) -> LoraExperts:
    """The experts of a pipeline, bound to conditioning that is the same for every row."""
    pipe, knob = attached(request.param, tmp_path)
    generator = torch.Generator().manual_seed(0)
    config = knob.experts.denoiser.config
    width = config.joint_attention_dim if request.param == "sd3" else config.cross_attention_dim
    states = torch.randn(1, 5, width, generator=generator)
    forward = knob.experts.forward

    def broadcast(x: Tensor, t: Tensor, **given):
        n = len(x)
        if request.param == "sdxl":
            given["added_cond_kwargs"] = {"text_embeds": torch.ones(n, 16), "time_ids": torch.ones(n, 6)}
        if request.param == "sd3":
            given["pooled_projections"] = torch.ones(n, config.pooled_projection_dim)
            t = t.expand(n)
        return forward(x, t, encoder_hidden_states=states.expand(n, -1, -1), **given)

    experts = knob.experts.bind()
    return LoraExperts(experts.denoiser, pipe.scheduler, experts.names, experts.switch, broadcast)


def test_conformance(experts: LoraExperts) -> None:
    """Shapes, order, agreement of predict and predict_each, independence of the batch, one-hot bit for bit."""
    x = torch.randn(4, *experts.event_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        check_all(experts, x, torch.tensor(0.502, dtype=torch.float64))


def test_description_follows_the_scheduler(tmp_path: Path) -> None:
    """The parametrisation is the scheduler's prediction type, the schedule its betas."""
    pipe, knob = attached("sd", tmp_path)
    assert knob.experts.parametrization == "eps"
    for index in (0, 499, 999):
        squared = knob.experts.schedule.alpha((index + 1) / 1000) ** 2
        assert float(squared) == pytest.approx(float(pipe.scheduler.alphas_cumprod[index]), rel=1e-5)
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    assert knob.experts.parametrization == "v"
    del pipe.scheduler.alphas_cumprod
    with pytest.raises(ValueError, match="noise levels"):
        _ = knob.experts.schedule


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6, 7, 8])
def test_a_limit_on_the_rows_changes_no_prediction(experts: LoraExperts, limit: int) -> None:
    """However many rows a forward may hold, predictions are the same to rounding, and no forward holds more."""
    x = torch.randn(3, *experts.event_shape, generator=torch.Generator().manual_seed(1))
    assignment = torch.tensor([2, 0, 1])
    rows: list[int] = []
    forward = experts.forward

    def count(x: Tensor, t: Tensor, **given):
        rows.append(len(x))
        return forward(x, t, **given)

    limited = LoraExperts(experts.denoiser, experts.scheduler, experts.names, experts.switch, count)
    limited.memory.max_batch = limit
    with torch.no_grad():
        for ask in (
            lambda e: e.predict(x, 0.502, ["first", "base", "second"]),
            lambda e: e.predict_each(x, 0.502, assignment),
            lambda e: e.predict_soup(x, 0.502, torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.2, 0.9]])),
        ):
            torch.testing.assert_close(ask(limited), ask(experts), rtol=1e-5, atol=1e-5)
    assert max(rows) <= limit


def test_running_out_of_memory_halves_the_rows(experts: LoraExperts) -> None:
    """A device that holds two rows at most serves three experts of two rows, after one failure, from then on."""
    x = torch.randn(2, *experts.event_shape, generator=torch.Generator().manual_seed(1))
    asked: list[int] = []
    forward = experts.forward

    def small_device(x: Tensor, t: Tensor, **given):
        asked.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return forward(x, t, **given)

    names = ["base", "first", "second"]
    limited = LoraExperts(experts.denoiser, experts.scheduler, experts.names, experts.switch, small_device)
    with torch.no_grad():
        torch.testing.assert_close(limited.predict(x, 0.502, names), experts.predict(x, 0.502, names))
        assert asked[:4] == [6, 2, 2, 2]
        before = len(asked)
        limited.predict(x, 0.502, names)
    assert max(asked[before:]) <= 2


def test_memory_that_holds_not_one_row_is_an_error(experts: LoraExperts) -> None:
    """There is an end to halving."""

    def no_device(x: Tensor, t: Tensor, **given):
        raise torch.OutOfMemoryError("out of memory")

    limited = LoraExperts(experts.denoiser, experts.scheduler, experts.names, experts.switch, no_device)
    with pytest.raises(torch.OutOfMemoryError):
        limited.predict(torch.zeros(2, *experts.event_shape), 0.502, ["base", "first"])


def test_the_core_samples_from_a_pipelines_experts(tmp_path: Path) -> None:
    """`dbtheory.sample` with DDIM's step is the pipeline itself, given the same noise: two loops, one trajectory."""
    pipe, knob = attached("sd", tmp_path)
    pipe.scheduler.register_to_config(set_alpha_to_one=True)
    pipe.scheduler.final_alpha_cumprod = torch.tensor(1.0)
    steps, prompt = 6, ["a red circle"]
    generator = torch.Generator().manual_seed(3)
    images = pipe(
        prompt, num_inference_steps=steps, guidance_scale=1.0, eta=1.0, generator=generator, output_type="latent"
    ).images
    text, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    generator = torch.Generator().manual_seed(3)
    x_T = torch.randn(1, 4, 8, 8, generator=generator)
    noise = torch.stack([torch.randn(1, 4, 8, 8, generator=generator) for _ in range(steps)])
    grid = torch.cat(((pipe.scheduler.timesteps.to(torch.float64) + 1) / 1000, torch.zeros(1, dtype=torch.float64)))
    with torch.no_grad():
        x0 = sample(
            knob.experts.bind(encoder_hidden_states=text), MeanBlend(HALF), 1, steps, method="ddim",
            x_T=x_T, noise=noise, phase=torch.zeros(1, dtype=torch.float64), grid=grid,
        )  # fmt: skip
    assert (x0 - images).abs().max() < 1e-4 * images.abs().max()


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
    assert tile(rows, n=2, m=1) is rows
    assert tile(value, n=2, m=1) is not value  # denoisers take residuals out of the lists that they are given
    assert torch.equal(tile(value, n=2, m=2, rows=slice(1, 2))["a"], rows[1:].repeat(2, 1))
