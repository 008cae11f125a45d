"""One denoiser in several pipelines, exceptions on the way, and what detaching leaves behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline
from torch import Tensor

from dbtheory.blend import SampledBlend, Step
from scale import attach
from scale.adapters import denoiser_of
from tests.scale import tiny
from tests.scale.families import FAMILIES, distance, latents, weights

SD, IMG2IMG, SD3, FLUX = (FAMILIES[name] for name in ("sd", "img2img", "sd3", "flux"))
FAULTS = [
    *((SD, "mpa", place) for place in ("callback", "denoiser", "scheduler")),
    (SD, "rs", "denoiser"),
    (SD3, "mpa-ls", "scheduler"),
    (FLUX, "mpa-ls", "callback"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of Stable Diffusion."""
    return SD.adapters(tmp_path_factory.mktemp("adapters") / "sd")


def from_pictures(pipe: Any, **parts: Any) -> StableDiffusionImg2ImgPipeline:
    """The same parts, or others, as a pipeline that starts from a picture."""
    second = StableDiffusionImg2ImgPipeline(**{**pipe.components, **parts}, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    return second


def euler(pipe: Any) -> Any:
    return EulerDiscreteScheduler.from_config(pipe.scheduler.config)


@pytest.mark.parametrize("own", [False, True], ids=["one scheduler", "its own scheduler"])
@pytest.mark.parametrize("method", ["mpa", "mpa-ls"])
def test_two_pipelines_share_one_denoiser(
    method: str, own: bool, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both blend, in any order, each as if it were alone, and each counts its own steps: 5, and the last 3 of 5."""
    first = tiny.sd()
    second = from_pictures(first, **({"scheduler": euler(first)} if own else {}))
    alone = tiny.img2img()
    if own:
        alone.scheduler = euler(alone)
    base = latents(first, SD), latents(second, IMG2IMG)
    attach(alone, files, weights(0.3), method)
    expected = latents(alone, IMG2IMG)
    knob = attach(first, files, weights(0.3), method)
    text = latents(first, SD)

    indices: list[int] = []
    choose = SampledBlend.choose

    def spy(blender: SampledBlend, probabilities: Any, step: Step) -> Tensor:
        indices.append(step.index)
        return choose(blender, probabilities, step)

    monkeypatch.setattr(SampledBlend, "choose", spy)
    for _ in range(2):
        assert torch.equal(latents(second, IMG2IMG), expected)
        assert torch.equal(latents(first, SD), text)
    assert indices == ([2, 3, 4, 0, 1, 2, 3, 4] * 2 if method == "mpa-ls" else [])
    knob.detach()
    assert torch.equal(latents(first, SD), base[0])
    assert torch.equal(latents(second, IMG2IMG), base[1])
    assert not {"step"} & {*vars(first.scheduler), *vars(second.scheduler)}


@pytest.mark.xfail(reason="a blend follows one call at a time: the outer call's phases are drawn anew", strict=True)
def test_a_call_inside_another_s_callback(files: dict[str, Path]) -> None:
    """A preview by a second pipeline, in the middle of the first one's call, disturbs neither."""
    first = tiny.sd()
    second = from_pictures(first, scheduler=euler(first))
    attach(first, files, weights(0.3), "mpa-ls")
    text, picture, previews = latents(first, SD), latents(second, IMG2IMG), []

    def preview(_pipe: Any, index: int, _t: Any, _values: dict) -> dict:
        if index == 1:
            previews.append(latents(second, IMG2IMG))
        return {}

    assert torch.equal(latents(first, SD, callback_on_step_end=preview), text)
    assert torch.equal(previews[0], picture)


def test_attaching_twice_is_an_error_that_says_so(files: dict[str, Path]) -> None:
    """Also through another pipeline that has the denoiser, whose own call then still blends; detach makes room."""
    first = tiny.sd()
    second = from_pictures(first)
    knob = attach(first, files, weights(0.3))
    expected = latents(second, IMG2IMG)
    for pipe in (first, second):
        with pytest.raises(ValueError, match="already has a blend attached; detach it first"):
            attach(pipe, files, weights(0.5))
    assert torch.equal(latents(second, IMG2IMG), expected)
    knob.detach()
    again = attach(second, files, weights(0.3))
    assert torch.equal(latents(second, IMG2IMG), expected)
    knob.detach()  # the old handle has no say any more
    assert torch.equal(latents(second, IMG2IMG), expected)
    again.detach()


class Fault:
    """Raises once `armed` and past its second passage, wherever it is put."""

    def __init__(self) -> None:
        self.armed, self.passages = False, 0

    def __call__(self, *_: Any, **__: Any) -> None:
        self.passages += self.armed
        if self.passages == 3:
            self.armed, self.passages = False, 0
            raise RuntimeError("a fault on the way")


def put(fault: Fault, place: str, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Put the fault into the pipeline; the options of the call that meets it."""
    denoiser = denoiser_of(pipe)
    if place == "callback":
        return {"callback_on_step_end": lambda *args: fault() or {}}
    if place == "denoiser":
        # in the middle of the network, where half of the layers have run
        (getattr(denoiser, "mid_block", None) or denoiser.norm_out).register_forward_pre_hook(fault)
    if place == "scheduler":
        step = type(pipe.scheduler).step
        kind = type("Faulty", (type(pipe.scheduler),), {"step": lambda *a, **k: fault() or step(*a, **k)})
        kind.step.__wrapped__ = step  # pyright: ignore  (pipelines read its arguments)
        monkeypatch.setattr(pipe.scheduler, "__class__", kind)
    return {}


@pytest.mark.parametrize(("family", "method", "place"), FAULTS)
def test_an_exception_leaves_the_pipeline_usable(
    family: Any, method: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a fault in the middle of a call the next call is what it would have been; so is detaching, bit for bit."""
    pipe, fault = family.make(), Fault()
    base, parameters = latents(pipe, family), {k: v.clone() for k, v in denoiser_of(pipe).state_dict().items()}
    options = put(fault, place, pipe, monkeypatch)
    knob = attach(pipe, family.adapters(tmp_path / "adapters"), weights(0.4), method)
    expected = latents(pipe, family)
    fault.armed = True
    with pytest.raises(RuntimeError, match="a fault on the way"):
        latents(pipe, family, **options)
    assert torch.equal(latents(pipe, family), expected)
    fault.armed = True
    with pytest.raises(RuntimeError, match="a fault on the way"):
        latents(pipe, family, **options)
    knob.detach()  # straight after a fault
    assert torch.equal(latents(pipe, family), base)
    after = denoiser_of(pipe).state_dict()
    assert list(after) == list(parameters)
    assert all(torch.equal(after[key], parameters[key]) for key in parameters)
    assert "step" not in vars(pipe.scheduler)


def test_steps_of_different_calls_do_not_mix(tmp_path: Path) -> None:
    """Calls of other lengths, resolutions and batch sizes follow one another: each is as on a fresh pipeline."""
    files, worn = SD3.adapters(tmp_path / "adapters"), SD3.make()
    attach(worn, files, weights(0.3), "mpa-ls")
    calls: tuple[dict[str, Any], ...] = (
        {"num_inference_steps": 3},
        {"height": 32, "width": 16},
        {"guidance_scale": 1.0},
        {"num_inference_steps": 7},
    )
    for options in calls:
        fresh = SD3.make()
        attach(fresh, files, weights(0.3), "mpa-ls")
        assert torch.equal(latents(worn, SD3, **options), latents(fresh, SD3, **options))
    one = latents(worn, SD3, prompts=["a red circle"], seeds=[1])
    assert distance(one, latents(worn, SD3)[:1]) < 1e-5
