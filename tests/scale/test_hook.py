"""Where a hook could silently do the wrong thing: each test is born of a bug that a review found."""

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, HeunDiscreteScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from torch import Tensor

from dbtheory import Preference
from scale import attach
from scale.caller import rows_per_image
from scale.certificate import groups_of
from tests.scale import tiny

HALF = Preference({"a": 0.5, "b": 0.5})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "a": tiny.save_lora(tiny.sd, folder / "a", 1),
        "b": tiny.save_lora(tiny.sd, folder / "b", 2, tiny.MIXED, rank=3),
    }


def run(pipe, prompts: list[str] | None = None, **options) -> Tensor:
    prompts = prompts or ["a red circle", "a blue heart"]
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "eta": 1.0, "output_type": "latent"} | options
    count = len(prompts) * options.get("num_images_per_prompt", 1)
    return pipe(prompts, generator=[torch.Generator().manual_seed(s) for s in range(count)], **settings).images


def test_many_images_group_by_prompt() -> None:
    """Above 25 rows torch's distances go by products of matrices, whose rounding parted equal rows."""
    prompts = torch.randn(13, 7, 16, generator=torch.Generator().manual_seed(0))
    rows = prompts.repeat_interleave(2, 0)
    assert groups_of([torch.cat([rows, rows])], [], 26).tolist() == [i - i % 2 for i in range(26)]


def test_images_of_other_conditions_share_no_group() -> None:
    """Pictures, masks and residuals condition images as prompts do, and so do whole numbers."""
    text, mask = torch.ones(4, 3), torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    assert groups_of([text, mask], [], 4).tolist() == [0, 1, 0, 1]
    assert groups_of([text, torch.tensor([[1], [1], [2], [1]])], [], 4).tolist() == [0, 0, 2, 0]


def test_resampling_starts_from_noise_with_one_preference(files: dict) -> None:
    """An image-to-image call, and a preference that changes on the way, have no target to resample towards."""
    pipe = tiny.sd()
    changing = Preference({"a": lambda s: 0.5 + s / 4, "b": lambda s: 0.5 - s / 4})
    with pytest.raises(ValueError, match="no target to resample towards"):
        attach(pipe, files, changing, correct="resample")
    knob = attach(pipe, files, HALF, correct="resample")
    with pytest.raises(ValueError, match="no target to resample towards"):
        knob.preference = changing
    again = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    picture = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match="starts from a picture"):
        again(["a red circle"] * 2, image=picture, strength=0.5, num_inference_steps=4, eta=1.0, output_type="latent")


def test_preferences_that_part_in_mid_call_part_the_groups(files: dict) -> None:
    """Images that come to want different things share no weights any more."""
    pipe = tiny.sd()
    knob = attach(pipe, files, HALF)
    w = torch.tensor([0.1, 0.9])

    def change(_pipe, index: int, _t, values: dict) -> dict:
        if index == 1:
            knob.preference = Preference({"a": w, "b": 1 - w})
        return values

    run(pipe, ["a red circle"] * 2, callback_on_step_end=change)
    assert knob.certificate.groups.tolist() == [0, 1]  # pyright: ignore


def test_blends_that_share_a_scheduler_part_in_peace(files: dict) -> None:
    """Two models, one scheduler object: whichever blend is detached first, the other still resamples rightly."""
    for first in (0, 1):
        pipes = [tiny.sd(), tiny.sd()]
        shared = DDPMScheduler.from_config(pipes[0].scheduler.config)
        knobs = []
        for pipe in pipes:
            pipe.scheduler = shared
            knobs.append(attach(pipe, files, HALF, correct="resample"))
        prompts = ["a red circle"] * 4
        expected = [run(pipe, prompts) for pipe in pipes][1 - first]
        assert knobs[1 - first].certificate.resamplings  # pyright: ignore
        knobs[first].detach()
        assert torch.equal(run(pipes[1 - first], prompts), expected)
        knobs[1 - first].detach()
        run(pipes[first])


def test_a_schedulers_own_step_comes_back(files: dict) -> None:
    """What a user put on the scheduler is there again after detach."""
    pipe = tiny.sd()
    calls, own = [], pipe.scheduler.step

    def counted(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    pipe.scheduler.step = counted
    knob = attach(pipe, files, HALF)
    run(pipe, eta=0.0)
    knob.detach()
    assert len(calls) == 4
    assert pipe.scheduler.step is counted


def test_a_copied_scheduler_is_watched_by_nobody(files: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines copy their schedulers; a copy must not hold a copy of the model."""
    pipe = tiny.sd()
    attach(pipe, files, HALF)
    run(pipe)

    def refuse(*_):
        raise AssertionError("the model was copied")

    monkeypatch.setattr(type(pipe.unet), "__deepcopy__", refuse, raising=False)
    twin = copy.deepcopy(pipe.scheduler)
    assert twin.step.__self__ is twin
    assert twin.step.__func__ is type(twin).step


@torch.no_grad()
def test_residuals_reach_every_expert(files: dict) -> None:
    """Denoisers pop residuals from the list they get: each forward of a small `max_batch` has a list of its own."""
    answers = []
    for max_batch in (None, 2):
        pipe = tiny.sd()
        attach(pipe, files, HALF, max_batch=max_batch)
        pipe.scheduler.set_timesteps(4)
        generator = torch.Generator().manual_seed(0)
        x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
        sizes = [(2, 8, 4, 4), (2, 16, 4, 4)]
        residuals = [torch.randn(size, generator=generator) for size in sizes]
        t = pipe.scheduler.timesteps[0]
        answers.append(pipe.unet(x, t, text, down_intrablock_additional_residuals=residuals)[0])
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-5)


def test_pefts_switches_under_the_blend(files: dict) -> None:
    """`set_adapters` and `disable_lora` change nothing; loading or unloading adapters under the blend is an error."""
    pipe = tiny.sd()
    attach(pipe, files, Preference({"a": 1.0, "b": 0.0}))
    expected = run(pipe)
    pipe.set_adapters(["b"])
    assert torch.equal(run(pipe), expected)
    pipe.disable_lora()
    assert torch.equal(run(pipe), expected)
    pipe.unload_lora_weights()
    with pytest.raises(ValueError, match="loaded or unloaded under the blend"):
        run(pipe)


@torch.no_grad()
def test_the_scale_of_one_call_stays_in_it(files: dict) -> None:
    """The attention scale is a call's own: experts asked later act whole, and experts bound to it halved."""
    pipe = tiny.sd()
    knob = attach(pipe, files, HALF)
    x, text = torch.ones(1, 4, 8, 8), torch.ones(1, 5, 16)
    bound = knob.experts.bind(encoder_hidden_states=text)
    before = bound.predict(x, 0.5, ["a", "b"])
    run(pipe, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(bound.predict(x, 0.5, ["a", "b"]), before)
    halved = knob.experts.bind(encoder_hidden_states=text, cross_attention_kwargs={"scale": 0.5})
    alone = torch.stack([halved.predict(x, 0.5, [name])[0] for name in ("a", "b")])
    torch.testing.assert_close(halved.predict(x, 0.5, ["a", "b"]), alone, rtol=1e-5, atol=1e-5)
    assert (alone - before).abs().max() > 1e-3


def test_a_pipeline_may_get_another_denoiser(files: dict) -> None:
    """The blend stays with its denoiser: the pipeline that it was attached through may leave."""
    pipe = tiny.sd()
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    knob = attach(pipe, files, HALF)
    expected = run(other)
    pipe.unet = tiny.sd(seed=5).unet
    assert torch.equal(run(other), expected)
    knob.detach()
    assert not torch.equal(run(other), expected)


@torch.no_grad()
def test_an_own_loop_may_begin_again(files: dict) -> None:
    """A loop abandoned after three steps and begun again on the same timesteps counts from 0, and knows no guidance."""
    pipe = tiny.sd()
    w = torch.tensor([0.1, 0.3, 0.6, 0.9])
    knob = attach(pipe, files, Preference({"a": w, "b": 1 - w}))
    run(pipe, ["a red circle"] * 4)  # leaves a guidance scale behind
    pipe.scheduler.set_timesteps(8)
    for _ in range(2):
        x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for index, t in enumerate(pipe.scheduler.timesteps[:3]):
            x = pipe.scheduler.step(pipe.unet(x, t, torch.ones(4, 5, 16))[0], t, x, 1.0).prev_sample
            assert knob._hook.step is not None
            assert knob._hook.step.index == index
        assert knob.certificate is not None
        assert knob.certificate.running.shape == (3, 4)


def test_heun_from_a_picture_keeps_its_steps(files: dict) -> None:
    """Heun's timesteps repeat: where a call begins among them, its scheduler says."""
    pipe = tiny.img2img()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    knob, indices = attach(pipe, files, HALF), []
    step = pipe.scheduler.step

    def spy(*args, **kwargs):
        assert knob._hook.step is not None
        result = step(*args, **kwargs)
        indices.append((knob._hook.step.index + 1, pipe.scheduler.step_index))
        return result

    pipe.scheduler.step = spy
    pipe(["a red circle"], image=torch.zeros(1, 3, 16, 16), strength=0.5, num_inference_steps=6, output_type="latent")
    assert indices
    assert all(own == schedulers for own, schedulers in indices)


def test_rows_of_an_image() -> None:
    """Guidance lays out all images once more, guidance by a picture twice more; other rows are images of their own."""

    class Guided:
        do_classifier_free_guidance = True

    phase = torch.tensor([0.1, 0.2]).double()
    assert rows_per_image(Guided(), phase.repeat(2)) == 2
    assert rows_per_image(Guided(), phase.repeat(3)) == 3
    assert rows_per_image(Guided(), phase[:1].repeat(3)) == 3
    assert rows_per_image(None, phase.repeat(2)) == 1
    assert rows_per_image(object(), phase.repeat(2)) == 1


def test_memory_format_may_change_between_calls(files: dict) -> None:
    """channels_last after the first call: stacks are made anew, and give what they gave."""
    pipe = tiny.sd()
    attach(pipe, files, HALF)
    expected = run(pipe)
    pipe.unet.to(memory_format=torch.channels_last)
    assert (run(pipe) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_detached_model_is_freed_at_once(files: dict) -> None:
    """No cycle is left: the model goes when its last user does, without a garbage collection."""
    pipe = tiny.sd()
    knob = attach(pipe, files, HALF)
    run(pipe)
    knob.detach()
    with pytest.raises(ValueError, match="detached"):
        _ = knob.experts
    assert not {"_diffusers_hook", "forward", "_compiled_call_impl"} & vars(pipe.unet).keys()
    gone = weakref.ref(pipe.unet)
    gc.collect()
    gc.disable()
    try:
        del pipe, knob
        assert gone() is None
    finally:
        gc.enable()
