"""A blend on every family of pipelines and every sampler: against diffusers' own pipeline, and against plain loops."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dbtheory import Preference
from dbtheory.blend import SampledBlend, Step
from scale import attach
from scale.adapters import denoiser_of
from tests.scale.families import FAMILIES, SAMPLERS, Family, Sampler, answer_by, distance, latents, single, weights

# every family with some samplers, every sampler with Stable Diffusion
CASES = [
    *(("sd", sampler) for sampler in SAMPLERS if sampler not in ("its own", "DPM-Solver++ of a flow")),
    *((family, sampler) for family in ("sdxl", "img2img") for sampler in ("DDIM at eta 1", "Euler", "DPM-Solver++")),
    ("inpaint", "DDIM at eta 0.5"),
    ("inpaint", "Euler ancestral"),
    ("inpaint of 9 channels", "DDPM"),
    ("sd3", "its own"),
    ("sd3", "DPM-Solver++ of a flow"),
    ("sd3 without T5", "its own"),
    ("flux", "its own"),
    ("flux without guidance", "its own"),
    ("flux with true guidance", "its own"),
]
SOME = ("sd", "sdxl", "img2img", "inpaint", "sd3", "flux", "flux with true guidance")
Files = Callable[[Family], dict[str, Path]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The adapters of a family."""
    folder = tmp_path_factory.mktemp("adapters")
    numbers = {id(family): str(number) for number, family in enumerate(FAMILIES.values())}
    return lambda family: family.adapters(folder / numbers[id(family)])


@pytest.fixture(params=CASES, ids=lambda case: ", ".join(case))
def case(request: pytest.FixtureRequest) -> tuple[Family, Sampler]:
    family, sampler = request.param
    return FAMILIES[family], SAMPLERS[sampler]


@pytest.fixture(params=SOME)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def test_one_hot_is_the_single_adapter_bit_for_bit(case: tuple[Family, Sampler], files: Files) -> None:
    """All weight on one adapter is diffusers' own pipeline with that adapter, by every method that takes weights."""
    family, sampler = case
    alone = single(family, files(family)["shape"])
    sampler.put_on(alone)
    expected = latents(alone, family, sampler)
    for method in ("mpa", "mpa-ls", "rs"):
        pipe = family.make()
        sampler.put_on(pipe)
        knob = attach(pipe, files(family), weights(0.5), method)
        mixed = latents(pipe, family, sampler)
        knob.preference = weights(0.0)
        assert torch.equal(latents(pipe, family, sampler), expected), method
        assert distance(mixed, expected) > 1e-3, method  # the control: the weights do something


def test_mean_blend_is_a_plain_loop_over_models(case: tuple[Family, Sampler], files: Files) -> None:
    """DB-MPA at w = (.3, .7), lambda = 1.2 is three whole models, evaluated in turn and averaged: 1e-5 in fp32."""
    family, sampler = case
    coefficients = {"style": 0.36, "shape": 0.84, "base": -0.2}
    pipe, reference = family.make(), family.make()
    attach(pipe, files(family), weights(0.3, 1.2))
    models = {name: denoiser_of(single(family, files(family).get(name))) for name in coefficients}

    def averaged(*args: Any, **kwargs: Any) -> Tensor:
        return sum(c * models[name](*args, **kwargs)[0] for name, c in coefficients.items())  # pyright: ignore

    answer_by(reference, averaged)
    sampler.put_on(pipe, reference)
    expected = latents(reference, family, sampler)
    assert distance(latents(pipe, family, sampler), expected) < 1e-5
    answer_by(reference, lambda *args, **kwargs: models["shape"](*args, **kwargs)[0])
    assert distance(latents(reference, family, sampler), expected) > 1e-3  # the control


class Draws:
    """What a `SampledBlend` was asked at each evaluation, and the expert that it drew for each row."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[Step] = []
        self.choices: list[Tensor] = []
        choose = SampledBlend.choose

        def spy(blender: SampledBlend, probabilities: Any, step: Step) -> Tensor:
            choice = choose(blender, probabilities, step)
            self.steps.append(step)
            self.choices.append(choice)
            return choice

        monkeypatch.setattr(SampledBlend, "choose", spy)


@pytest.mark.parametrize("order", ["low-discrepancy", "iid"])
def test_sampled_blend_is_a_loop_that_switches_models(
    case: tuple[Family, Sampler], files: Files, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each step each image is evaluated by the one model that was drawn for it, and by no other.

    The steps are counted from the start of the schedule, wherever the pipeline begins and however often it evaluates
    its denoiser in one; all rows of an image follow one model; the low-discrepancy order is MATH.md 6's formula.
    """
    family, sampler = case
    pipe, reference = family.make(), family.make()
    attach(pipe, files(family), weights(0.3), "mpa-ls", order=order)
    models = [denoiser_of(single(family, files(family)[name])) for name in ("style", "shape")]
    sampler.put_on(pipe, reference)
    draws = Draws(monkeypatch)
    result = latents(pipe, family, sampler)

    count = len(pipe.scheduler.timesteps)
    evaluations = range(family.calls * family.start, family.calls * count)
    assert [(step.index, step.count) for step in draws.steps] == [(k // family.calls, count) for k in evaluations]
    phase = draws.steps[0].phase
    for step, choice in zip(draws.steps, draws.choices, strict=True):
        assert torch.equal(step.phase, phase)
        assert torch.equal(choice, choice[:2].repeat(len(choice) // 2))
        if order == "low-discrepancy":
            taken = [math.floor((step.index + 1) * 0.3 + u) > math.floor(step.index * 0.3 + u) for u in phase.tolist()]
            assert choice.tolist() == [0 if first else 1 for first in taken]
    assert torch.cat(draws.choices).unique().tolist() == [0, 1]

    choices = iter(draws.choices)

    def switching(*args: Any, **kwargs: Any) -> Tensor:
        outputs = torch.stack([model(*args, **kwargs)[0] for model in models])
        return outputs[next(choices), torch.arange(outputs.shape[1])]

    answer_by(reference, switching)
    assert distance(result, latents(reference, family, sampler)) < 1e-5


def test_methods_differ(family: Family, files: Files) -> None:
    """Control of the equalities: experts, base, and every method give different pictures."""
    outcomes = {"base": latents(single(family, None), family)}
    requests = {
        "style": ("mpa", 1.0, {}),
        "shape": ("mpa", 0.0, {}),
        "mpa": ("mpa", 0.5, {}),
        "mpa-ls": ("mpa-ls", 0.5, {}),
        "mpa-ls iid": ("mpa-ls", 0.5, {"order": "iid"}),
        "rs": ("rs", 0.5, {}),
        "rs-factors": ("rs-factors", 0.5, {}),
    }
    pipe = family.make()
    for name, (method, style, options) in requests.items():
        knob = attach(pipe, files(family), weights(style), method, **options)
        outcomes[name] = latents(pipe, family)
        knob.detach()
    pairs = [(a, b) for i, a in enumerate(outcomes) for b in list(outcomes)[:i]]
    assert all(distance(outcomes[a], outcomes[b]) > 1e-4 for a, b in pairs)
    assert torch.equal(latents(pipe, family), outcomes["base"])


# one preference an image: every number differs
PER_IMAGE = (torch.tensor([0.1, 0.9, 0.0, 0.5]), torch.tensor([1.0, 0.6, 0.3, 0.0]))


@pytest.mark.parametrize("method", ["mpa", "mpa-ls", "rs", "rs-factors"])
def test_each_image_follows_its_own_preference(family: Family, files: Files, method: str) -> None:
    """A batch of two prompts with two images each, one preference an image, equals four calls: 1e-5 in fp32."""
    style, kl_scale = PER_IMAGE
    pipe, prompts, seeds = family.make(), ("a red circle", "a white star"), (1, 2, 3, 4)
    knob = attach(pipe, files(family), Preference({"style": style, "shape": 1 - style}, kl_scale), method)
    together = latents(pipe, family, prompts=prompts, seeds=seeds, num_images_per_prompt=2)
    for i, seed in enumerate(seeds):
        knob.preference = weights(float(style[i]), float(kl_scale[i]))
        alone = latents(pipe, family, prompts=prompts[i // 2 : i // 2 + 1], seeds=[seed])
        assert distance(together[i], alone[0]) < 1e-5
        other = (i + 1) % 4
        knob.preference = weights(float(style[other]), float(kl_scale[other]))
        control = latents(pipe, family, prompts=prompts[i // 2 : i // 2 + 1], seeds=[seed])
        assert distance(together[i], control[0]) > 1e-3


@pytest.mark.parametrize("method", ["mpa", "mpa-ls", "rs"])
def test_as_many_preferences_as_images(family: Family, files: Files, method: str) -> None:
    """Three or four preferences for two images are refused, also where guidance makes four rows; two then work."""
    pipe = family.make()
    knob = attach(pipe, files(family), weights(0.5), method)
    for count in (3, 4):
        style = torch.linspace(0.2, 0.8, count)
        knob.preference = Preference({"style": style, "shape": 1 - style})
        with pytest.raises(ValueError, match=r"2 images.*each of " + str(count)):
            latents(pipe, family)
    style = torch.tensor([0.2, 0.8])
    knob.preference = Preference({"style": style, "shape": 1 - style})
    assert bool(latents(pipe, family).isfinite().all())


@pytest.mark.parametrize(("method", "options"), [("mpa", {}), ("mpa-ls", {"order": "iid"}), ("rs", {})])
def test_a_function_of_progress_is_a_change_on_the_way(
    family: Family, files: Files, method: str, options: dict
) -> None:
    """A preference that switches at half way equals a callback that sets the knob then; progress is the schedule's."""
    pipe, count = family.make(), 10
    early, late = weights(0.8), weights(0.2)

    def style(progress: float) -> float:
        return 0.8 if progress < 0.5 else 0.2

    knob = attach(pipe, files(family), Preference({"style": style, "shape": lambda p: 1 - style(p)}), method, **options)
    changing = latents(pipe, family, num_inference_steps=count)
    evaluated = int(count * family.options.get("strength", 1.0))

    def callback(_pipe: Any, index: int, _t: Any, values: dict) -> dict:
        following = count - evaluated + index + 1
        if following / (count - 1) >= 0.5:
            knob.preference = late
        return values

    knob.preference = early
    stepwise = latents(pipe, family, num_inference_steps=count, callback_on_step_end=callback)
    assert knob.preference == late
    assert torch.equal(changing, stepwise)
    for constant in (early, late):
        knob.preference = constant
        assert distance(changing, latents(pipe, family, num_inference_steps=count)) > 1e-4
