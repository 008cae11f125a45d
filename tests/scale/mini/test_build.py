"""`python -m scale.mini.build`, every stage made tiny."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from scale import mini
from scale.mini import base, build, card, judge, world
from scale.mini.build import Build
from scale.train.settings import Dpok

CHOSEN = ("alignment", "colorfulness20-jpeg80")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Build:
    """A few pictures, two steps a stage, one round an expert, float32: seconds instead of an hour."""
    dpok = Dpok(
        rounds=1, prompts_per_round=1, samples_per_prompt=2, steps=2, updates=1, batch=4, value_updates=1,
        precision="no",  # minutes where bf16 is emulated
    )  # fmt: skip
    monkeypatch.setattr(judge, "TEST_PICTURES", 4)
    steps = dict.fromkeys(("autoencoder_steps", "decoder_steps", "denoiser_steps", "judge_steps"), 2)
    monkeypatch.setattr(card, "STEPS", 2)
    return Build(tmp_path / "work", tmp_path / "out", CHOSEN, pictures=64, card_prompts=2, dpok=dpok, **steps)


@pytest.mark.slow
def test_every_stage_runs_and_is_not_run_again(tiny: Build) -> None:
    """From nothing to a model that diffusers opens, a judge, two adapters and a card; a second run changes none.

    The adapters are trained by two processes at once.
    """
    build.main(replace(tiny, processes=2))
    pipe = StableDiffusionPipeline.from_pretrained(tiny.out / "model")
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    files = {path: path.stat().st_mtime_ns for path in tiny.out.rglob("*") if path.is_file()}
    names = {str(path.relative_to(tiny.out)) for path in files}
    assert {"README.md", "card.json", "judge/judge.safetensors", "judge/judge.json"} <= names
    for name in CHOSEN:
        assert {f"adapters/{name}/training.json", f"adapters/{name}/pytorch_lora_weights.safetensors"} <= names
    os.remove(tiny.out / "card.json")
    build.main(tiny)
    card_files = ("card.json", "README.md", "curves.png")
    kept = {path: path.stat().st_mtime_ns for path in files if path.name not in card_files}
    assert all(files[path] == when for path, when in kept.items())
    assert (tiny.out / "card.json").is_file()


@pytest.mark.slow
def test_workers_end_with_a_killed_parent() -> None:
    """Their common output closes, which it does when the last of them has ended."""
    script = """
import os, time
from scale.mini.build import workers
pool = workers(1)
print(pool.submit(os.getpid).result(), flush=True)
pool.submit(time.sleep, 600).result()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert int(parent.stdout.readline()) != parent.pid
        parent.kill()
        assert parent.communicate(timeout=60)[0] == ""


@pytest.mark.slow
def test_the_model_depends_on_the_seed_alone(tiny: Build) -> None:
    """Two builds with one seed in two folders give the same UNet, bit for bit."""
    other = Build(**{**vars(tiny), "work": tiny.work / "other", "out": tiny.out / "other"})
    for options in (tiny, other):
        options.work.mkdir(parents=True, exist_ok=True)
        build.build_model(options)
    name = "model/unet/diffusion_pytorch_model.safetensors"
    first, second = load_file(tiny.out / name), load_file(other.out / name)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_work_folder_belongs_to_its_options(tiny: Build) -> None:
    """Checkpoints of another seed would be resumed as if they were this one's: ValueError that says what to do."""
    tiny.work.mkdir()
    build._claim(tiny)
    build._claim(Build(**{**vars(tiny), "out": tiny.out / "elsewhere", "experts": ("jpeg",)}))
    with pytest.raises(ValueError, match="other options"):
        build._claim(Build(**{**vars(tiny), "seed": 1}))


def test_the_shipped_weights_do_not_stand_in_for_a_build() -> None:
    """By default a build writes beside its checkpoints; in the shipped folder every stage would look done."""
    assert not Build().out.resolve().is_relative_to(mini.WEIGHTS.resolve())
    assert mini.WEIGHTS.resolve() not in Build().out.resolve().parents


def test_an_unknown_expert_is_refused(tiny: Build) -> None:
    """ValueError that lists the experts, before any work."""
    with pytest.raises(ValueError, match="alignment, colorfulness, symmetry, jpeg"):
        build.main(Build(**{**vars(tiny), "experts": ("beauty",)}))


def test_pictures_are_rendered_once(tmp_path: Path) -> None:
    """The captions are captions of training prompts' shapes, some colours wrong; a second call reads the file."""
    path = tmp_path / "pictures.npz"
    images, captions = base.pictures(path, 200, wrong_colours=0.5, seed=3)
    assert images.shape == (200, 3, world.SIZE, world.SIZE)
    known = set(world.train_prompts())
    share = sum(caption in known for caption in captions) / len(captions)
    assert 0.5 < share < 1.0  # a wrong colour may fall on a held-out caption
    again, same = base.pictures(path, 200, wrong_colours=0.5, seed=3)
    assert torch.equal(images, again)
    assert captions == same
