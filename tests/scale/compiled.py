"""A blend beside torch.compile, in each of its forms and in either order of set-up."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from scale import attach
from scale.adapters import denoiser_of
from tests.scale.families import FAMILIES, Family, distance, latents, single, weights

SD, FLUX = FAMILIES["sd"], FAMILIES["flux"]
FORMS = ("torch.compile(denoiser)", "denoiser.compile()", "compile_repeated_blocks")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graph of another test, before or after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


def compiled(pipe: Any, form: str, backend: Any, fullgraph: bool = False) -> None:
    """Compile the pipeline's denoiser as users do."""
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    if form == "torch.compile(denoiser)":
        setattr(pipe, name, torch.compile(getattr(pipe, name), backend=backend, fullgraph=fullgraph))
    elif form == "denoiser.compile()":
        getattr(pipe, name).compile(backend=backend, fullgraph=fullgraph)
    else:
        getattr(pipe, name).compile_repeated_blocks(backend=backend, fullgraph=fullgraph)


@pytest.mark.parametrize("first", ["compile", "attach"])
@pytest.mark.parametrize(("family", "form"), [(SD, FORMS[0]), (FLUX, FORMS[1]), (FLUX, FORMS[2])])
def test_compiled_is_eager_and_compiles_once(family: Family, form: str, first: str, folder: Path) -> None:
    """The same pictures as eager, 1e-5; and no graph is made anew when the preference, the expert or the step changes.

    A new batch size makes one, which shows that the counter would tell.
    """
    files = family.adapters(folder / str(family is SD))
    eager, pipe = family.make(), family.make()
    backend = CompileCounterWithBackend("aot_eager" if form == FORMS[2] else "eager")
    knob: Any = None
    for stage in (first, {"compile": "attach", "attach": "compile"}[first]):
        if stage == "compile":
            # around a blend that is attached already, no graph can be whole
            compiled(pipe, form, backend, fullgraph=first == "compile" or "blocks" in form)
        else:
            knob = attach(pipe, files, weights(0.3), "mpa-ls")
    reference = attach(eager, files, weights(0.3), "mpa-ls")
    assert distance(latents(pipe, family), latents(eager, family)) < 1e-5
    graphs = backend.frame_count
    assert graphs > 0
    for style, kl_scale, options in (
        (0.3, 1.0, {"num_inference_steps": 4, "seeds": (7, 8)}),
        (0.8, 0.6, {}),
        (0.0, 1.0, {}),
        (1.0, 1.0, {}),
        (0.5, 0.0, {}),
    ):
        knob.preference = reference.preference = weights(style, kl_scale)
        assert distance(latents(pipe, family, **options), latents(eager, family, **options)) < 1e-5
    assert backend.frame_count == graphs
    latents(pipe, family, prompts=["a red circle"] * 3, seeds=(1, 2, 3))
    assert backend.frame_count > graphs
    knob.detach()
    assert distance(latents(pipe, family), latents(single(family, None), family)) < 1e-5


@pytest.mark.parametrize("method", ["mpa", "rs", "rs-factors"])
def test_compiled_blends_of_several_experts(method: str, folder: Path) -> None:
    """Blends and soups too compile once a number of rows, whatever their weights."""
    files = FLUX.adapters(folder / "False")
    eager, pipe = FLUX.make(), FLUX.make()
    backend = CompileCounterWithBackend("eager")
    knob, reference = attach(pipe, files, weights(0.3), method), attach(eager, files, weights(0.3), method)
    compiled(pipe, "denoiser.compile()", backend)
    assert distance(latents(pipe, FLUX), latents(eager, FLUX)) < 1e-5
    graphs = backend.frame_count
    for style in (0.4, 0.9):
        knob.preference = reference.preference = weights(style)
        assert distance(latents(pipe, FLUX), latents(eager, FLUX)) < 1e-5
    assert backend.frame_count == graphs > 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor writes C++")
def test_inductor(folder: Path) -> None:
    """The backend that users have: the same pictures as eager to 1e-4, whose kernels reorder sums."""
    files = FLUX.adapters(folder / "False")
    eager, pipe = FLUX.make(), FLUX.make()
    knob, reference = (attach(each, files, weights(0.3), "mpa") for each in (pipe, eager))
    compiled(pipe, "denoiser.compile()", "inductor")
    for style in (0.3, 0.9):
        knob.preference = reference.preference = weights(style)
        assert distance(latents(pipe, FLUX), latents(eager, FLUX)) < 1e-4
    assert denoiser_of(pipe)._compiled_call_impl is not None
