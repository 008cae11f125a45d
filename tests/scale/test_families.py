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
# a family with one sampler of each kind: those where every method and order is tried
FIRST = dict(reversed(CASES))
# one of each way to count steps and to call the denoiser
DRAWN = [("flux with true guidance", "its own"), ("img2img", "Euler"), ("sd", "DPM-Solver++"), ("sd", "DDIM at eta 1")]
DRAWN += [(name, sampler) for name, sampler in FIRST.items() if name not in dict(DRAWN)]
SOME = ("sd", "img2img", "sd3", "flux with true guidance")
Files = Callable[[Family], dict[str, Path]]
Model = Callable[[Family, str], Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The adapters of a family."""
    folder = tmp_path_factory.mktemp("adapters")
    numbers = {id(family): str(number) for number, family in enumerate(FAMILIES.values())}
    return lambda family: family.adapters(folder / numbers[id(family)])


@pytest.fixture(scope="module")
def model(files: Files) -> Model:
    """A family's denoiser with one adapter, or the base, by diffusers alone; made once."""
    made: dict[tuple[int, str], Any] = {}

    def find(family: Family, name: str) -> Any:
        if (id(family), name) not in made:
            made[id(family), name] = denoiser_of(single(family, files(family).get(name)))
        return made[id(family), name]

    return find


Case = tuple[Family, Sampler]


def cases(*names: tuple[str, str]) -> pytest.MarkDecorator:
    """Families with their samplers, by name."""
    values = [(FAMILIES[family], SAMPLERS[sampler]) for family, sampler in names]
    return pytest.mark.parametrize("case", values, ids=[", ".join(name) for name in names])


@pytest.fixture(params=SOME)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def assert_one_hot_is_single(case: Case, files: Files, method: str) -> None:
    family, sampler = case
    pipe, alone = family.make(), single(family, files(family)["shape"])
    attach(pipe, files(family), weights(0.0), method)
    sampler.put_on(pipe, alone)
    assert torch.equal(latents(pipe, family, sampler), latents(alone, family, sampler))


@cases(*CASES)
def test_one_hot_is_the_single_adapter_bit_for_bit(case: Case, files: Files) -> None:
    """All weight on one adapter is diffusers' own pipeline with that adapter."""
    assert_one_hot_is_single(case, files, "mpa")


@cases(*FIRST.items())
@pytest.mark.parametrize("method", ["mpa-ls", "rs", "rs-factors"])
def test_one_hot_by_the_other_methods(case: Case, files: Files, method: str) -> None:
    """Drawing among one expert, and a soup of one, are that expert too, bit for bit."""
    assert_one_hot_is_single(case, files, method)


@cases(*CASES)
def test_mean_blend_is_a_plain_loop_over_models(case: Case, files: Files, model: Model) -> None:
    """DB-MPA at w = (.3, .7), lambda = 1.2 is three whole models, evaluated in turn and averaged: 1e-5 in fp32."""
    family, sampler = case
    coefficients = {"style": 0.36, "shape": 0.84, "base": -0.2}
    pipe, reference = family.make(), family.make()
    attach(pipe, files(family), weights(0.3, 1.2))
    models = {name: model(family, name) for name in coefficients}

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


@pytest.mark.parametrize(
    ("case", "order"),
    [
        pytest.param((FAMILIES[family], SAMPLERS[sampler]), order, id=f"{family}, {sampler}, {order}")
        for order, names in (("low-discrepancy", DRAWN), ("iid", DRAWN[:3]))
        for family, sampler in names
    ],
)
def test_sampled_blend_is_a_loop_that_switches_models(
    case: Case, order: str, files: Files, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each step each image is evaluated by the one model that was drawn for it, and by no other.

    The steps are counted from the start of the schedule, wherever the pipeline begins and however often it evaluates
    its denoiser in one; all rows of an image follow one model; the low-discrepancy order is MATH.md 6's formula.
    """
    family, sampler = case
    pipe, reference = family.make(), family.make()
    attach(pipe, files(family), weights(0.3), "mpa-ls", order=order)
    models = [model(family, name) for name in ("style", "shape")]
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
        outputs = torch.stack([each(*args, **kwargs)[0] for each in models])
        return outputs[next(choices), torch.arange(outputs.shape[1])]

    answer_by(reference, switching)
    assert distance(result, latents(reference, family, sampler)) < 1e-5


def test_methods_differ(family: Family, files: Files) -> None:
    """Control of the equalities: experts, base, and every method give different pictures; detach gives the base's."""
    pipe, outcomes = family.make(), {"base": latents(single(family, None), family)}
    knob = attach(pipe, files(family), weights(1.0))
    for name, preference in {"style": weights(1.0), "shape": weights(0.0), "mpa": weights(0.5)}.items():
        knob.preference = preference
        outcomes[name] = latents(pipe, family)
    knob.detach()
    iid: dict[str, Any] = {"order": "iid"}
    for method, options in (("mpa-ls", {}), ("mpa-ls", iid), ("rs", {}), ("rs-factors", {})):
        knob = attach(pipe, files(family), weights(0.5), method, **options)
        outcomes[f"{method} {options}"] = latents(pipe, family)
        knob.detach()
    pairs = [(a, b) for i, a in enumerate(outcomes) for b in list(outcomes)[:i]]
    assert all(distance(outcomes[a], outcomes[b]) > 1e-4 for a, b in pairs)
    assert torch.equal(latents(pipe, family), outcomes["base"])


# one preference an image: every number differs
PER_IMAGE = (torch.tensor([0.1, 0.9, 0.0, 0.5]), torch.tensor([1.0, 0.6, 0.3, 0.0]))


@pytest.mark.parametrize("method", ["mpa", "mpa-ls", "rs"])
def test_each_image_follows_its_own_preference(family: Family, files: Files, method: str) -> None:
    """A batch of two prompts with two images each, one preference an image, equals four calls: 1e-5 in fp32."""
    style, kl_scale = PER_IMAGE
    pipe, prompts, seeds = family.make(), ("a red circle", "a white star"), (1, 2, 3, 4)
    knob = attach(pipe, files(family), Preference({"style": style, "shape": 1 - style}, kl_scale), method)
    together = latents(pipe, family, prompts=prompts, seeds=seeds, num_images_per_prompt=2)

    def alone(image: int, preference: int) -> Tensor:
        knob.preference = weights(float(style[preference]), float(kl_scale[preference]))
        return latents(pipe, family, prompts=prompts[image // 2 : image // 2 + 1], seeds=seeds[image : image + 1])[0]

    for i in range(4):
        assert distance(together[i], alone(i, i)) < 1e-5
    assert distance(together[1], alone(1, 2)) > 1e-3  # the control


@pytest.mark.parametrize("method", ["mpa", "mpa-ls", "rs"])
@pytest.mark.parametrize("kind", ["sd", "flux with true guidance"])
def test_as_many_preferences_as_images(kind: str, files: Files, method: str) -> None:
    """Three or four preferences for two images are refused, also where guidance makes four rows; two then work."""
    family = FAMILIES[kind]
    pipe = family.make()
    knob = attach(pipe, files(family), weights(0.5), method)
    for count in (3, 4):
        style = torch.linspace(0.2, 0.8, count)
        knob.preference = Preference({"style": style, "shape": 1 - style})
        with pytest.raises(ValueError, match=f"2 images.*each of {count}"):
            latents(pipe, family)
    style = torch.tensor([0.2, 0.8])
    knob.preference = Preference({"style": style, "shape": 1 - style})
    assert bool(latents(pipe, family).isfinite().all())


@pytest.mark.parametrize(
    ("kind", "method", "options"),
    [
        ("sd", "mpa", {}),
        ("sd", "mpa-ls", {"order": "iid"}),
        ("sd", "rs", {}),
        ("img2img", "mpa", {}),
        ("flux with true guidance", "mpa", {}),
    ],
)
def test_a_function_of_progress_is_a_change_on_the_way(kind: str, method: str, options: dict, files: Files) -> None:
    """A preference that switches at half way equals a callback that sets the knob then; progress is the schedule's."""
    family, count = FAMILIES[kind], 10
    pipe, early, late = family.make(), weights(0.8), weights(0.2)

    def style(progress: float) -> float:
        return 0.8 if progress < 0.5 else 0.2

    switching = Preference({"style": style, "shape": lambda progress: 1 - style(progress)})
    knob = attach(pipe, files(family), switching, method, **options)
    changing = latents(pipe, family, num_inference_steps=count)
    start = count - int(count * family.options.get("strength", 1.0))
    assert start / (count - 1) < 0.5

    def callback(_pipe: Any, index: int, _t: Any, values: dict) -> dict:
        if (start + index + 1) / (count - 1) >= 0.5:
            knob.preference = late
        return values

    knob.preference = early
    stepwise = latents(pipe, family, num_inference_steps=count, callback_on_step_end=callback)
    assert knob.preference == late
    assert torch.equal(changing, stepwise)
    for constant in (early, late):
        knob.preference = constant
        assert distance(changing, latents(pipe, family, num_inference_steps=count)) > 1e-4
