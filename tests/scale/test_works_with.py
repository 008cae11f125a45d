"""A blend beside what else users do with a pipeline: callbacks, outputs, dtypes, formats, saving, little memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dbtheory import Preference
from scale import attach
from scale.adapters import denoiser_of
from tests.scale.families import FAMILIES, Family, answer_by, distance, latents, single, weights

SD, SDXL, SD3, FLUX = (FAMILIES[name] for name in ("sd", "sdxl", "sd3", "flux"))
SAFE = "pytorch_lora_weights.safetensors"
METHODS = ("mpa", "mpa-ls", "rs", "rs-factors")
Files = Callable[[Family], dict[str, Path]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The adapters of a family."""
    folder = tmp_path_factory.mktemp("adapters")
    numbers = {id(family): str(number) for number, family in enumerate(FAMILIES.values())}
    return lambda family: family.adapters(folder / numbers[id(family)])


def attached(family: Family, files: Files, method: str = "mpa", **options: Any) -> Any:
    """A pipeline that blends both adapters alike."""
    pipe = family.make()
    attach(pipe, files(family), weights(0.5), method, **options)
    return pipe


@pytest.mark.parametrize("family", [SD, SD3, FLUX], ids=["sd", "sd3", "flux"])
@pytest.mark.parametrize("method", ["mpa", "mpa-ls"])
def test_outputs_of_every_kind(family: Family, method: str, files: Files) -> None:
    """PIL, arrays, tensors, and tuples are the same pictures: n prompts times num_images_per_prompt of them."""
    pipe = attached(family, files, method)
    options: dict[str, Any] = {"seeds": (1, 2, 3, 4), "num_images_per_prompt": 2}
    pictures = latents(pipe, family, output_type="pt", **options)
    assert pictures.shape == (4, 3, 16, 16)
    arrays = latents(pipe, family, output_type="np", **options)
    assert torch.equal(torch.from_numpy(np.asarray(arrays)).permute(0, 3, 1, 2), pictures)
    images: Any = latents(pipe, family, output_type="pil", **options)
    expected = (255 * pictures).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert all(np.array_equal(np.asarray(image), array) for image, array in zip(images, expected, strict=True))
    generators = [torch.Generator().manual_seed(seed) for seed in options["seeds"]]
    prompts = ["a red circle", "a blue heart and a white star"]
    settings = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "pt", "num_images_per_prompt": 2}
    returned = pipe(prompts, generator=generators, return_dict=False, **settings, **family.options)
    assert torch.equal(returned[0], pictures)


@pytest.mark.parametrize("method", METHODS)
def test_a_callback_sees_and_changes_every_step(method: str, files: Files) -> None:
    """What a callback does to the latents enters the next step: at once, in order, once a step."""
    pipe, seen = attached(SD, files, method), []

    def freeze(_pipe: Any, index: int, _t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(index)
        return {"latents": torch.ones_like(values["latents"])} if index == 4 else {}

    last = latents(pipe, SD, callback_on_step_end=freeze)
    assert seen == [0, 1, 2, 3, 4]
    assert torch.equal(last, torch.ones_like(last))

    def halve(_pipe: Any, index: int, _t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": values["latents"] / 2} if index == 2 else {}

    plain, changed = latents(pipe, SD), latents(pipe, SD, callback_on_step_end=halve)
    assert distance(changed, plain) > 1e-2


@pytest.mark.parametrize("family", [SD, FLUX], ids=["sd", "flux"])
def test_a_saved_adapter_is_the_file_it_was_loaded_from(family: Family, files: Files, tmp_path: Path) -> None:
    """`save_lora_adapter` of an adapter that has been blended writes its factors and its alpha, and no stacks."""
    pipe = attached(family, files)
    latents(pipe, family)
    denoiser = denoiser_of(pipe)
    assert not [key for key in denoiser.state_dict() if "stack" in key or "scales" in key]
    for name, file in files(family).items():
        denoiser.save_lora_adapter(tmp_path / name, adapter_name=name)
        given = {key.split(".", 1)[1]: value for key, value in load_file(file / SAFE).items()}
        saved = load_file(tmp_path / name / SAFE)
        assert saved.keys() == given.keys()
        assert all(torch.equal(saved[key], given[key]) for key in given)
    saved = {name: tmp_path / name for name in files(family)}
    again = family.make()
    attach(again, saved, weights(0.5))
    assert torch.equal(latents(again, family), latents(pipe, family))  # alpha too is what it was


def test_a_pipeline_saved_while_attached_is_the_base_model(files: Files, tmp_path: Path) -> None:
    """A scheduler that is watched saves its configuration as ever, and its class survives."""
    pipe = attached(SD, files)
    latents(pipe, SD)
    pipe.scheduler.save_pretrained(tmp_path)
    again = type(pipe.scheduler).from_pretrained(tmp_path)
    for key in set(again.config) - {"_use_default_values"}:
        assert again.config[key] == pipe.scheduler.config[key]
    assert "step" not in vars(again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", [SD, SD3, FLUX], ids=["sd", "sd3", "flux"])
def test_half_precision(family: Family, dtype: torch.dtype, files: Files) -> None:
    """In half precision the blend is as far from the plain loop in fp32 as that loop is: the dtype's own rounding."""
    coefficients = {"style": 0.36, "shape": 0.84, "base": -0.2}

    def loop(dtype: torch.dtype) -> Tensor:
        reference = family.make().to(dtype)
        models = {name: denoiser_of(single(family, files(family).get(name)).to(dtype)) for name in coefficients}
        answer_by(reference, lambda *a, **k: sum(c * models[n](*a, **k)[0] for n, c in coefficients.items()))  # pyright: ignore
        return latents(reference, family)

    pipe = family.make().to(dtype)
    attach(pipe, files(family), weights(0.3, 1.2))
    result, exact = latents(pipe, family), loop(torch.float32)
    assert result.dtype == dtype
    error, rounding = ((x.double() - exact).std() / exact.std() for x in (result, loop(dtype)))
    assert error < 1.5 * rounding
    assert rounding < 0.05
    for method in METHODS if family is SD and dtype == torch.bfloat16 else ():  # and every method runs
        other = family.make().to(dtype)
        attach(other, files(family), weights(0.3), method)
        assert bool(latents(other, family).isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_the_pipeline_moves_after_attaching(method: str, files: Files) -> None:
    """`pipe.to(dtype)` after attaching, also between calls, equals attaching to one of that dtype, bit for bit."""
    before = SDXL.make().to(torch.bfloat16)
    attach(before, files(SDXL), weights(0.5), method)
    expected = latents(before, SDXL)
    after = attached(SDXL, files, method)
    latents(after, SDXL)  # the stacks are made in fp32
    assert torch.equal(latents(after.to(torch.bfloat16), SDXL), expected)


@pytest.mark.parametrize("method", METHODS)
def test_channels_last(method: str, files: Files) -> None:
    """The memory format changes no result: 1e-5 in fp32, whether it is set before or after attaching."""
    expected = latents(attached(SD, files, method), SD)
    before = SD.make()
    before.unet.to(memory_format=torch.channels_last)
    attach(before, files(SD), weights(0.5), method)
    after = attached(SD, files, method)
    after.unet.to(memory_format=torch.channels_last)
    for pipe in (before, after):
        assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert distance(latents(pipe, SD), expected) < 1e-5


def halved(files: dict[str, Path], folder: Path) -> dict[str, Path]:
    """The same adapters with deltas half as large."""
    for name, file in files.items():
        with safe_open(file / SAFE, framework="pt") as opened:
            header = opened.metadata()
        table = {k: v / 2 if "lora_B" in k else v for k, v in load_file(file / SAFE).items()}
        (folder / name).mkdir()
        save_file(table, folder / name / SAFE, metadata=header)
    return {name: folder / name for name in files}


@pytest.mark.parametrize("family", [SD, SD3, FLUX], ids=["sd", "sd3", "flux"])
def test_the_scale_of_attention_arguments(family: Family, files: Files, tmp_path: Path) -> None:
    """`{"scale": 0.5}` in the attention arguments halves every adapter, by every method, in one call alone."""
    half = halved(files(family), tmp_path)
    argument = "cross_attention_kwargs" if family is SD else "joint_attention_kwargs"
    steps: dict[str, Any] = {"num_inference_steps": 2}
    for method, style in (*((method, 0.3) for method in METHODS), ("mpa", 1.0)):
        pipe, reference = family.make(), family.make()
        attach(pipe, files(family), weights(style), method)
        attach(reference, half, weights(style), method)
        whole, expected = latents(pipe, family, **steps), latents(reference, family, **steps)
        assert distance(latents(pipe, family, **{argument: {"scale": 0.5}}, **steps), expected) < 1e-5
        assert torch.equal(latents(pipe, family, **steps), whole), "the scale stayed"
        assert distance(whole, expected) > 1e-4  # the control


def forwards(pipe: Any) -> list[int]:
    """The rows of every forward of the denoiser, from now on."""
    rows: list[int] = []
    denoiser_of(pipe).conv_in.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


@pytest.mark.parametrize(
    ("method", "max_batch", "expected"),
    [
        ("mpa", None, [8]),
        ("mpa", 8, [8]),
        ("mpa", 7, [4, 4]),
        ("mpa", 4, [4, 4]),
        ("mpa", 3, [3, 1, 3, 1]),
        ("mpa", 1, [1] * 8),
        ("mpa-ls", 4, [4]),
        ("mpa-ls", 3, [3, 1]),
        ("rs", 1, [1] * 4),
        ("rs-factors", 2, [2, 2]),
    ],
)
def test_a_bound_on_the_rows_of_a_forward(method: str, max_batch: int | None, expected: list, files: Files) -> None:
    """Two experts, two images, guidance: 8 rows a step, in as few forwards as `max_batch` allows; equal to 1e-5."""
    style, kl_scale = torch.tensor([0.2, 0.7]), torch.tensor([1.0, 0.0 if method == "mpa-ls" else 1.0])
    preference = Preference({"style": style, "shape": 1 - style}, kl_scale)
    pipe, whole = SD.make(), SD.make()
    attach(pipe, files(SD), preference, method, max_batch=max_batch)
    attach(whole, files(SD), preference, method)
    rows = forwards(pipe)
    assert distance(latents(pipe, SD), latents(whole, SD)) < 1e-5
    assert rows == expected * 5


class Memory:
    """A device that holds `rows` rows of a forward, and says so as torch does."""

    def __init__(self, pipe: Any, rows: int) -> None:
        self.rows, self.seen = rows, []
        denoiser_of(pipe).conv_in.register_forward_pre_hook(self.enter)

    def enter(self, _: Any, args: tuple[Tensor, ...]) -> None:
        self.seen.append(len(args[0]))
        if len(args[0]) > self.rows:
            raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(("method", "first"), [("mpa", [8, 4, 2]), ("mpa-ls", [4, 2]), ("rs", [4, 2])])
def test_out_of_memory_halves_the_rows(method: str, first: list[int], files: Files) -> None:
    """A forward that does not fit is tried again in halves, once and for all: equal to 1e-5, and no call fails."""
    pipe = attached(SD, files, method)
    expected = latents(pipe, SD)
    memory = Memory(pipe, 2)
    assert distance(latents(pipe, SD), expected) < 1e-5
    assert memory.seen[: len(first)] == first
    assert set(memory.seen[len(first) :]) == {2}
    latents(pipe, SD)
    assert memory.seen.count(first[0]) == 1


def test_out_of_memory_for_one_row_is_the_user_s_to_see(files: Files) -> None:
    """Where not even one row fits, torch's own error comes out, and the pipeline works again with more memory."""
    pipe = attached(SD, files)
    expected = latents(pipe, SD)
    memory = Memory(pipe, 0)
    with pytest.raises(torch.OutOfMemoryError):
        latents(pipe, SD)
    assert memory.seen == [8, 4, 2, 1]
    memory.rows = 8
    assert distance(latents(pipe, SD), expected) < 1e-5
