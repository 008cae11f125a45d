"""`attach` on real pipelines: against diffusers' own with one adapter, and against a plain loop over models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from dbtheory import Preference
from dbtheory.blend import Step
from scale import attach
from tests.scale import tiny

PROMPTS = ["a red circle", "a blue heart and a white star"]
MAKERS = {"sd": tiny.sd, "sdxl": tiny.sdxl}
SCHEDULERS = [
    DDIMScheduler,
    DDPMScheduler,
    PNDMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
]
Make = Callable[[], DiffusionPipeline]


@pytest.fixture(scope="module", params=MAKERS, ids=list(MAKERS))
def make(request: pytest.FixtureRequest) -> Make:
    return MAKERS[request.param]


@pytest.fixture(scope="module")
def files(make: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of different ranks and layers (Linear alone; Linear and Conv2d)."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "style": tiny.save_lora(make, folder / "style", 1),
        "shape": tiny.save_lora(make, folder / "shape", 2, tiny.MIXED, rank=3),
    }


def run(pipe: DiffusionPipeline, prompts: list[str] = PROMPTS, seeds: tuple[int, ...] = (1, 2), **options) -> Tensor:
    """Latents of an ordinary pipeline call."""
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "eta": 1.0, "output_type": "latent"} | options
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, generator=generators, **settings).images


def half(**options) -> Preference:
    return Preference({"style": 0.5, "shape": 0.5}, **options)


def single(make: Make, file: Path | None) -> DiffusionPipeline:
    """diffusers' own pipeline with one adapter, or none."""
    pipe = make()
    if file is not None:
        pipe.load_lora_weights(file)  # pyright: ignore
        pipe.unet.eval()
    return pipe


@pytest.mark.parametrize("method", ["mpa", "mpa-ls"])
@pytest.mark.parametrize("winner", ["style", "shape", "base"])
def test_one_hot_is_the_single_expert_bit_for_bit(make: Make, files: dict, winner: str, method: str) -> None:
    """All weight on one expert (or lambda = 0) is diffusers' own pipeline with that adapter, bit for bit."""
    pipe = make()
    weights = {name: float(name == winner) for name in files} if winner != "base" else {"style": 0.5, "shape": 0.5}
    attach(pipe, files, Preference(weights, kl_scale=float(winner != "base")), method=method)
    assert torch.equal(run(pipe), run(single(make, files.get(winner))))


def test_methods_differ(make: Make, files: dict) -> None:
    """Control of the test above: the experts, the base and the blends are all different."""
    pipe = make()
    outcomes = [run(pipe), *(run(single(make, file)) for file in files.values())]
    knob = attach(pipe, files, half())
    outcomes.append(run(pipe))
    knob.preference = half(kl_scale=1.5)
    outcomes.append(run(pipe))
    knob.detach()
    attach(pipe, files, half(), method="mpa-ls")
    outcomes.append(run(pipe))
    for i, first in enumerate(outcomes):
        assert all((first - other).abs().max() > 1e-3 for other in outcomes[:i])


def test_detach_restores_the_pipeline_bit_for_bit(make: Make, files: dict) -> None:
    """After detach: the same output, the same parameters under the same names, the same module types, no hook."""
    pipe = make()
    before, expected = {k: v.clone() for k, v in pipe.unet.state_dict().items()}, run(pipe)
    kinds = [type(module) for module in pipe.unet.modules()]
    pipe.unet.conv_in.requires_grad_(False)
    trainable = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    knob = attach(pipe, files, half())
    run(pipe)
    knob.detach()
    after = pipe.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [type(module) for module in pipe.unet.modules()] == kinds
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())
    assert not hasattr(pipe.unet, "peft_config")
    assert [parameter.requires_grad for parameter in pipe.unet.parameters()] == trainable
    assert torch.equal(run(pipe), expected)
    with pytest.raises(ValueError, match="detached"):
        knob.preference = half()
    knob.detach()  # once more changes nothing
    attach(pipe, files, half())  # and it can be attached again


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_mean_blend_is_a_plain_loop_over_models(make: Make, files: dict, scheduler: type, guidance: float) -> None:
    """DB at w = (.3, .7), lambda = 1.2 equals m + 1 separate pipelines whose denoisers are averaged in turn, 1e-5."""
    pipe = make()
    attach(pipe, files, Preference({"style": 0.3, "shape": 0.7}, kl_scale=1.2))
    coefficients = {"style": 0.36, "shape": 0.84, "base": -0.2}
    models = {name: single(make, files.get(name)).unet for name in coefficients}
    reference = make()

    def averaged(*args, **kwargs) -> tuple[Tensor]:
        outputs = {name: model(*args, **kwargs)[0] for name, model in models.items()}
        return (sum(c * outputs[name] for name, c in coefficients.items()),)  # pyright: ignore

    reference.unet.forward = averaged
    for each in (pipe, reference):
        each.scheduler = scheduler.from_config(each.scheduler.config)
    expected = run(reference, guidance_scale=guidance)
    error = (run(pipe, guidance_scale=guidance) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


@pytest.mark.parametrize("method", ["mpa", "mpa-ls"])
def test_an_image_does_not_depend_on_its_batch(make: Make, files: dict, method: str) -> None:
    """An image alone, in another order, and in a batch of two is the same to rounding, also where experts are drawn."""
    pipe = make()
    attach(pipe, files, half(), method=method)
    together = run(pipe, num_inference_steps=6)
    swapped = run(pipe, PROMPTS[::-1], (2, 1), num_inference_steps=6).flip(0)
    alone = torch.cat([run(pipe, [p], (s,), num_inference_steps=6) for p, s in zip(PROMPTS, (1, 2), strict=True)])
    for other in (swapped, alone):
        assert (together - other).abs().max() < 1e-5 * together.abs().max()


def test_sampled_blend_costs_one_evaluation_a_step(make: Make, files: dict) -> None:
    """DB-MPA-LS sends n rows a step through the denoiser (2 n with guidance), DB-MPA m times as many."""
    rows = {}
    for method in ("mpa", "mpa-ls"):
        pipe, seen = make(), []
        pipe.unet.conv_in.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0])))
        attach(pipe, files, half(), method=method)
        run(pipe)
        rows[method] = seen
    assert rows == {"mpa": [8] * 4, "mpa-ls": [4] * 4}


def test_both_rows_of_guidance_follow_one_expert(files: dict, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draw is per image: the unconditional and the conditional row of an image get the same expert, every step."""
    pipe, drawn = make(), []
    knob = attach(pipe, files, half(), method="mpa-ls")
    blender = knob._hook.blender

    def spy(experts, x: Tensor, t: Tensor, step: Step) -> Tensor:
        drawn.append(blender.choose([0.5, 0.5], step))  # pyright: ignore
        return blender(experts, x, t, step)

    monkeypatch.setattr(knob._hook, "blender", spy)
    run(pipe, num_inference_steps=8)
    choices = torch.stack(drawn)
    assert torch.equal(choices[:, :2], choices[:, 2:])
    assert len(choices) == 8
    assert len(choices.unique()) == 2


def test_callbacks_batches_and_output_types_keep_working(make: Make, files: dict) -> None:
    """num_images_per_prompt, callbacks that see every step, and PIL output are diffusers' own business still."""
    pipe, steps = make(), []
    attach(pipe, files, half(), method="mpa-ls")

    def callback(_pipe, index: int, _t, values: dict) -> dict:
        steps.append(index)
        return values

    images = pipe("a red ring", num_inference_steps=3, num_images_per_prompt=2, callback_on_step_end=callback,
                  generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    assert steps == [0, 1, 2]
    assert [image.size for image in images] == [(16, 16)] * 2


def test_guidance_may_be_turned_off_on_the_way(make: Make, files: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback that halves the rows changes neither the count of steps nor the phases of the images."""
    pipe, steps = make(), []
    knob = attach(pipe, files, half(), method="mpa-ls")
    blender = knob._hook.blender

    def spy(experts, x: Tensor, t: Tensor, step: Step) -> Tensor:
        steps.append(step)
        return blender(experts, x, t, step)

    def callback(pipe, index: int, _t, values: dict) -> dict:
        if index == 3:
            pipe._guidance_scale = 1.0
            values = {name: value.chunk(2)[-1] for name, value in values.items() if name != "latents"}
            for name in ("add_text_embeds", "add_time_ids"):
                values.setdefault(name, None)
        return {name: value for name, value in values.items() if value is not None}

    inputs = ["prompt_embeds"] if make is tiny.sd else ["prompt_embeds", "add_text_embeds", "add_time_ids"]
    monkeypatch.setattr(knob._hook, "blender", spy)
    run(pipe, num_inference_steps=8, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=inputs)
    assert [step.index for step in steps] == list(range(8))
    assert [len(step.phase) for step in steps] == [4] * 4 + [2] * 4
    assert torch.equal(steps[-1].phase, steps[0].phase[:2])


def test_preference_can_change_between_calls(make: Make, files: dict) -> None:
    """Setting knob.preference equals attaching afresh with it; a bad one is refused and changes nothing."""
    pipe, fresh = make(), make()
    knob = attach(pipe, files, half())
    run(pipe)
    knob.preference = Preference({"style": 0.9, "shape": 0.1}, kl_scale=0.5)
    attach(fresh, files, Preference({"style": 0.9, "shape": 0.1}, kl_scale=0.5))
    assert torch.equal(run(pipe), run(fresh))
    with pytest.raises(ValueError, match="unknown expert"):
        knob.preference = Preference({"style": 0.5, "other": 0.5})
    assert knob.preference.weights == {"style": 0.9, "shape": 0.1}
    assert torch.equal(run(pipe), run(fresh))


def test_an_exception_inside_a_call_leaves_the_pipeline_usable(make: Make, files: dict) -> None:
    """A callback that raises in the middle of a trajectory does not disturb the next call."""
    pipe = make()
    attach(pipe, files, half(), method="mpa-ls")
    expected = run(pipe)

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run(pipe, callback_on_step_end=fail)
    assert torch.equal(run(pipe), expected)


@pytest.mark.parametrize(
    ("preference", "method", "message"),
    [
        (half(), "soup", "unknown method"),
        (half(), "kla", "kla"),
        (half(kl_scale=1.5), "mpa-ls", "use mpa"),
        (Preference({"style": 1.0}), "mpa", "no weight for expert"),
        (Preference({"style": 0.5, "other": 0.5}), "mpa", "unknown expert"),
    ],
)
def test_a_bad_request_is_refused_before_anything_changes(
    make: Make, files: dict, preference: Preference, method: str, message: str
) -> None:
    """ValueError that names the fault, and a pipeline as it was."""
    pipe = make()
    expected = run(pipe)
    with pytest.raises(ValueError, match=message):
        attach(pipe, files, preference, method=method)
    assert not hasattr(pipe.unet, "peft_config")
    assert torch.equal(run(pipe), expected)


def test_a_bad_second_file_leaves_no_trace_of_the_first(make: Make, files: dict, tmp_path: Path) -> None:
    """attach is all or nothing."""
    pipe = make()
    expected = run(pipe)
    with pytest.raises(ValueError, match="no adapter at"):
        attach(pipe, {"style": files["style"], "shape": tmp_path / "none"}, half())
    assert not hasattr(pipe.unet, "peft_config")
    assert torch.equal(run(pipe), expected)


def test_attaching_twice_is_an_error_that_says_so(make: Make, files: dict) -> None:
    """The second attach would load adapters over the first; so would one over adapters that the user loaded."""
    pipe = make()
    attach(pipe, files, half())
    with pytest.raises(ValueError, match="already has a blend"):
        attach(pipe, files, half())
    with pytest.raises(ValueError, match="unload_lora_weights"):
        attach(single(make, files["style"]), files, half())
