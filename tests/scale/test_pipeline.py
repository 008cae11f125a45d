"""Opening every family of pipelines, their schedulers, and batches of pictures."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scale.pipeline import SCHEDULERS, Picture, batches, draw, open_pipeline, set_scheduler
from tests.scale import tiny

FAMILIES = {"sd": tiny.sd, "sdxl": tiny.sdxl, "sd3": tiny.sd3, "flux": tiny.flux}
SIZE = {"height": 16, "width": 16}  # a saved Flux pipeline forgets the tiny one's size
PICTURES = [Picture(prompt, i, seed) for i, prompt in enumerate(["a red circle", "a blue square"]) for seed in (3, 4)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline of every family."""
    folder = tmp_path_factory.mktemp("models")
    for name, make in FAMILIES.items():
        make().save_pretrained(folder / name)
    return folder


def images(pipe: Any, pictures: list[Picture] = PICTURES, **options: Any) -> Tensor:
    return torch.cat([batch for _, batch in draw(pipe, pictures, steps=2, **SIZE, **options)])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_draws_what_diffusers_draws(folders: Path, family: str) -> None:
    """The pictures are those of the pipeline's own call with the same generators."""
    pipe: Any = open_pipeline(folders / family)
    assert type(pipe) is type(FAMILIES[family]())
    options = {"eta": 1.0} if family in ("sd", "sdxl") else {}
    own = pipe(
        [picture.prompt for picture in PICTURES],
        generator=[torch.Generator().manual_seed(picture.seed) for picture in PICTURES],
        num_inference_steps=2, output_type="pt", **SIZE, **options,
    ).images  # fmt: skip
    assert torch.equal(images(pipe), own.float().cpu())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_does_not_depend_on_its_batch(folders: Path, family: str) -> None:
    """One at a time, and in any order, the pictures are equal to 1e-5 (kernels differ); other seeds' are not."""
    pipe = open_pipeline(folders / family)
    together = images(pipe)
    assert images(pipe, batch_size=1).sub(together).abs().max() < 1e-5
    assert images(pipe, PICTURES[::-1], batch_size=3).flip(0).sub(together).abs().max() < 1e-5
    # the control
    assert together[0].sub(together[1]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype(folders: Path, dtype: torch.dtype) -> None:
    """Weights have the type asked for; pictures come as float32 all the same."""
    pipe = open_pipeline(folders / "sd", dtype)
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {dtype}
    drawn = images(pipe, PICTURES[:1])
    assert drawn.dtype == torch.float32
    assert bool(drawn.isfinite().all())


def test_offload_needs_a_gpu(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is loaded where there is no GPU; where there is one, diffusers' own offload is used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="there is no GPU"):
        open_pipeline(folders / "nothing", offload=True)
    called = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("diffusers.DiffusionPipeline.enable_model_cpu_offload", lambda pipe: called.append(pipe))
    assert called == [open_pipeline(folders / "sd", offload=True)]


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "flow-euler"])
def test_schedulers_of_noise_predicting_models(folders: Path, name: str) -> None:
    """Each keeps the model's noise schedule, draws finite pictures, and each seed its own."""
    pipe = open_pipeline(folders / "sd")
    own = dict(pipe.scheduler.config)
    set_scheduler(pipe, name)
    assert type(pipe.scheduler) is SCHEDULERS[name]
    for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type"):
        assert pipe.scheduler.config[key] == own[key]
    drawn = images(pipe)
    assert drawn.shape == (4, 3, 16, 16)
    assert not torch.equal(drawn[0], drawn[1])
    assert images(pipe, batch_size=1).sub(drawn).abs().max() < 1e-4


def test_flow_matching_has_its_own_scheduler() -> None:
    """flow-euler for SD3 and Flux alone, and nothing else for them: a wrong pair is refused, and left as it was."""
    for family, model in FAMILIES.items():
        flow = family in ("sd3", "flux")
        fit = "flow-euler" if flow else "ddim"
        pipe = model()
        for name in SCHEDULERS:
            if (name == "flow-euler") == flow:
                set_scheduler(pipe, name)
                continue
            before = pipe.scheduler
            with pytest.raises(ValueError, match=f"the scheduler {re.escape(name)} .* use {fit}"):
                set_scheduler(pipe, name)
            assert pipe.scheduler is before
    with pytest.raises(ValueError, match="unknown scheduler 'heun'"):
        set_scheduler(tiny.sd(), "heun")


def test_options_that_a_pipeline_does_not_know_are_refused() -> None:
    """A size or guidance that would be dropped silently is a ValueError that names it."""

    class NoGuidance(DiffusionPipeline):
        def __call__(self, prompt, generator, num_inference_steps, output_type):
            raise AssertionError("called")

    with pytest.raises(ValueError, match="NoGuidance knows no guidance_scale, height"):
        next(draw(NoGuidance(), PICTURES, steps=1, guidance=2.0, height=8))


def test_pipelines_that_need_a_picture_are_refused(tmp_path: Path) -> None:
    """Image-to-image pipelines take more than a prompt: `attach` drives them, `open_pipeline` does not."""
    tiny.img2img().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from prompts alone"):
        open_pipeline(tmp_path)


@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=6), size=st.integers(1, 8))
def test_batches(counts: list[int], size: int) -> None:
    """All pictures, in order, at most `size` at a time; with whole prompts, none is cut and none is refused in vain."""
    pictures = [Picture("p", index, seed) for index, count in enumerate(counts) for seed in range(count)]
    plain = batches(pictures, size)
    assert [picture for batch in plain for picture in batch] == pictures
    assert all(len(batch) == size for batch in plain[:-1])
    if max(counts) > size:
        with pytest.raises(ValueError, match=f"received batch_size {size}; use at least {max(counts)}"):
            batches(pictures, size, whole_prompts=True)
        return
    whole = batches(pictures, size, whole_prompts=True)
    assert [picture for batch in whole for picture in batch] == pictures
    assert all(1 <= len(batch) <= size for batch in whole)
    assert sum(len({picture.index for picture in batch}) for batch in whole) == len(counts)
