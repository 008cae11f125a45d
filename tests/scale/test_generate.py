"""`generate` end to end on a tiny Stable Diffusion folder with two adapters."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_model

import scale.generate
from scale.generate import Request, generate
from scale.pipeline import open_pipeline
from scale.rewards import load_scorer
from scale.rewards.alignment import Alignment, Judge
from tests.scale import tiny

PROMPTS = ["a red circle and a blue square", "a knight on a horse"]
WEIGHTS = {"style": 0.75, "shape": 0.25}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, two adapters, and a judge of random weights."""
    folder = tmp_path_factory.mktemp("files")
    tiny.sd().save_pretrained(folder / "model")
    tiny.save_lora(tiny.sd, folder / "style", 1)
    tiny.save_lora(tiny.sd, folder / "shape", 2, tiny.MIXED, rank=3)
    torch.manual_seed(0)
    save_model(Judge().half(), str(folder / "judge.safetensors"))
    return folder


@pytest.fixture(autouse=True)
def _judge(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The tests need no shipped weights."""
    monkeypatch.setattr(
        scale.generate, "load_scorer", lambda name: Alignment(folder) if name == "alignment" else load_scorer(name)
    )


def request_of(folder: Path, out: Path, **changes) -> Request:
    adapters = {name: folder / name for name in WEIGHTS}
    request = Request(PROMPTS, WEIGHTS, out, model=str(folder / "model"), adapters=adapters, steps=3, num=2, seed=5)
    return replace(request, **changes)


def pictures(record: Path) -> dict[tuple[str, int], np.ndarray]:
    """The images of a record by prompt and seed."""
    entries = json.loads(record.read_text())["images"]
    return {(e["prompt"], e["seed"]): np.asarray(Image.open(record.parent / e["file"])) for e in entries}


def largest_difference(first: dict, second: dict) -> int:
    """In steps of 8-bit colour, over the images that both have (all of the first)."""
    return max(int(np.abs(image.astype(int) - second[key].astype(int)).max()) for key, image in first.items())


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of one run, which the tests below compare others with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            scale.generate, "load_scorer", lambda name: Alignment(folder) if name == "alignment" else load_scorer(name)
        )
        return generate(request_of(folder, tmp_path_factory.mktemp("made")))


def test_one_picture_of_native_size_a_prompt_and_image(made: Path) -> None:
    """Two prompts, two images each: four RGB files of 16 x 16 pixels, one record, nothing else."""
    names = ["00000-5.png", "00000-6.png", "00001-5.png", "00001-6.png"]
    assert sorted(path.name for path in made.parent.iterdir()) == [*names, "generation.json"]
    for name in names:
        with Image.open(made.parent / name) as image:
            assert (image.format, image.size, image.mode) == ("PNG", (16, 16), "RGB")


def test_the_record_says_everything_that_made_them(made: Path, folder: Path) -> None:
    """Model, method, preference, adapters, sampler and versions once; prompt, seed, file and rewards an image."""
    record = json.loads(made.read_text())
    assert record["model"] == str(folder / "model")
    assert record["method"] == "mpa"
    assert record["weights"] == WEIGHTS
    assert record["kl_scale"] == 1.0
    assert record["coefficients"] == {"base": 0.0, **WEIGHTS}
    assert record["adapters"] == {name: str(folder / name) for name in WEIGHTS}
    assert record["scheduler"] == "DDIMScheduler"
    assert (record["steps"], record["eta"], record["batch_size"]) == (3, 1.0, 16)
    assert set(record["versions"]) == {"diffusion-blend", "torch", "diffusers", "peft", "transformers"}
    assert record["versions"]["torch"] == torch.__version__
    assert [(image["prompt"], image["seed"]) for image in record["images"]] == [
        (PROMPTS[0], 5), (PROMPTS[0], 6), (PROMPTS[1], 5), (PROMPTS[1], 6),
    ]  # fmt: skip


def test_the_rewards_are_those_of_the_files(made: Path, folder: Path) -> None:
    """The recorded scores are the scorers' of the PNG as stored; alignment only where it knows the prompt."""
    small = ("colorfulness", "jpeg", "symmetry")
    scorers = {"alignment": Alignment(folder)} | {name: load_scorer(name) for name in small}
    for entry in json.loads(made.read_text())["images"]:
        pixels = torch.from_numpy(np.array(Image.open(made.parent / entry["file"]))).permute(2, 0, 1)[None] / 255
        known = scorers if entry["prompt"] == PROMPTS[0] else {n: s for n, s in scorers.items() if n != "alignment"}
        expected = {name: float(scorer.score(pixels, [entry["prompt"]])) for name, scorer in known.items()}
        assert entry["rewards"] == pytest.approx(expected, abs=1e-6)  # sums of thousands of float32


def test_the_same_request_gives_the_same_bytes(made: Path, folder: Path, tmp_path: Path) -> None:
    """Nothing but the request decides: every file and the record are equal bit for bit."""
    generate(request_of(folder, tmp_path))
    for path in made.parent.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("method", ["mpa", "mpa-ls"])
def test_batch_size_and_order_do_not_matter(folder: Path, tmp_path: Path, method: str) -> None:
    """An image depends on its prompt and seed: alone or in other company it is equal to 1/255 (kernels differ)."""
    together = pictures(generate(request_of(folder, tmp_path / "a", method=method)))
    alone = pictures(generate(request_of(folder, tmp_path / "b", method=method, batch_size=1)))
    backwards = pictures(
        generate(request_of(folder, tmp_path / "c", method=method, batch_size=3, prompts=PROMPTS[::-1], num=3, seed=4))
    )
    assert largest_difference(together, alone) <= 1
    assert largest_difference(together, backwards) <= 1


def test_seeds_prompts_and_weights_matter(made: Path, folder: Path, tmp_path: Path) -> None:
    """The control: another seed, prompt or weight gives another picture, by far more than the tolerance above."""
    images = pictures(made)
    other = pictures(generate(request_of(folder, tmp_path, weights={"style": 0.0, "shape": 1.0})))
    assert all(int(np.abs(images[key].astype(int) - other[key].astype(int)).max()) > 3 for key in images)
    for (_, first), (_, second) in ((a, b) for a in images.items() for b in images.items() if a[0] < b[0]):
        assert int(np.abs(first.astype(int) - second.astype(int)).max()) > 3


def test_base_is_diffusers_own_and_ignores_weights(folder: Path, tmp_path: Path) -> None:
    """`base` takes any weights, loads no adapter, and draws what the pipeline itself draws from the same seeds."""
    record = generate(request_of(folder, tmp_path, method="base", weights={"nobody": 7.0}, batch_size=4))
    settings = json.loads(record.read_text())
    assert (settings["weights"], settings["adapters"], settings["coefficients"]) == ({}, {}, {"base": 1.0})
    pipe = open_pipeline(str(folder / "model"))
    images = pipe(  # pyright: ignore
        [prompt for prompt in PROMPTS for _ in range(2)],
        generator=[torch.Generator().manual_seed(seed) for _ in PROMPTS for seed in (5, 6)],
        num_inference_steps=3,
        eta=1.0,
        output_type="np",
    ).images
    for drawn, stored in zip(images, pictures(record).values(), strict=True):
        assert np.array_equal((255 * drawn).round().astype(np.uint8), stored)


def test_path_separators_in_prompts_stay_inside_the_folder(folder: Path, tmp_path: Path) -> None:
    """Files are named by numbers: a prompt that looks like a path writes nowhere else."""
    out = tmp_path / "deep" / "out"
    prompts = ["../../escaped", "a/b", str(tmp_path / "absolute"), "nul\\byte"]
    generate(request_of(folder, out, prompts=prompts, num=1, steps=1, method="base"))
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {f"deep/out/{name}" for name in ("generation.json", *(f"{i:05d}-5.png" for i in range(4)))}
    assert [e["prompt"] for e in json.loads((out / "generation.json").read_text())["images"]] == prompts


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num": 0}, "num must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": -5}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seeds must lie in"),
        ({"seed": 2**63}, "seeds must lie in"),
        ({"eta": -0.1}, "eta must lie in"),
        ({"eta": 1.5}, "eta must lie in"),
        ({"eta": float("nan")}, "eta must lie in"),
        ({"guidance": float("inf")}, "guidance must be finite"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": ["  "]}, "no prompt"),
    ],
)
def test_wrong_numbers_are_refused(folder: Path, tmp_path: Path, changes: dict, reason: str) -> None:
    """Numbers that make no picture are a ValueError before anything is loaded."""
    with pytest.raises(ValueError, match=reason):
        request_of(folder, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"_class_name": "NoSuchPipeline"}'])
def test_broken_model_folders_are_refused(tmp_path: Path, content: str | None) -> None:
    """A folder that is no diffusers model is a ValueError, whatever diffusers itself would raise."""
    if content is not None:
        (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(ValueError, match="model"):
        open_pipeline(tmp_path)


def test_a_model_that_takes_no_prompt_is_refused(tmp_path: Path) -> None:
    """A pipeline without prompts cannot be asked for a picture of one."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from prompts alone"):
        open_pipeline(tmp_path)
