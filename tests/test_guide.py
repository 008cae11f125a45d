"""The guide docs/diffusers.md: its code runs as printed, on tiny random models in place of the hub's."""

import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import scale.generate
from scale import cli
from tests.scale import tiny


def with_scheduler(make: Any, scheduler: Any, **options: Any) -> Any:
    """A pipeline with the scheduler that the hub's has, whose noise schedule stays."""
    pipe = make()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
    return pipe


MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        diffusers.StableDiffusionPipeline,
        partial(with_scheduler, tiny.sd, diffusers.PNDMScheduler, skip_prk_steps=True),
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        diffusers.StableDiffusionXLPipeline,
        partial(with_scheduler, tiny.sdxl, diffusers.EulerDiscreteScheduler),
    ),
    "black-forest-labs/FLUX.1-dev": (diffusers.FluxPipeline, tiny.flux),
}
ADAPTERS = {
    "loras/aesthetic.safetensors": (tiny.sd, tiny.LINEAR),
    "loras/detail": (tiny.sd, tiny.MIXED),
    "loras/both.safetensors": (tiny.sd, tiny.LINEAR),
    "loras/xl-aesthetic.safetensors": (tiny.sdxl, tiny.LINEAR),
    "loras/xl-detail.safetensors": (tiny.sdxl, tiny.MIXED),
    "loras/flux-aesthetic.safetensors": (tiny.flux, tiny.MMDIT),
    "loras/flux-detail.safetensors": (tiny.flux, tiny.LINEAR),
}
HEADINGS = {"Stable Diffusion 1.5", "SDXL", "Flux"}


def blocks(root: Path, language: str) -> list[tuple[str, str]]:
    """Every code block of the guide in a language, under its heading."""
    text = (root / "docs" / "diffusers.md").read_text(encoding="utf-8")
    sections = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)[1:]
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    parts = zip(sections[::2], sections[1::2], strict=True)
    found = [(head, code) for head, body in parts for code in fence.findall(body)]
    assert found
    return found


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's machine: its adapters lie in the folder, its GPU is the CPU in float32.

    Its models are tiny, with the schedulers of the hub's. `compile` does nothing: it has tests of its own.
    """
    monkeypatch.chdir(tmp_path)
    for seed, (name, (make, targets)) in enumerate(ADAPTERS.items()):
        if name.endswith(".safetensors"):
            file = tiny.save_lora(make, tmp_path / f"made-{seed}", seed, targets) / "pytorch_lora_weights.safetensors"
            (tmp_path / "loras").mkdir(exist_ok=True)
            file.rename(tmp_path / name)
        else:
            tiny.save_lora(make, tmp_path / name, seed, targets)

    def from_pretrained(cls: Any, model: str, *, dtype: torch.dtype) -> Any:
        kind, make = MODELS[model]
        assert cls is kind
        assert dtype in (torch.float16, torch.bfloat16)
        return make()

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", lambda pipe, *args, **options: pipe)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "enable_model_cpu_offload", lambda pipe: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)


@pytest.mark.slow
def test_python_blocks(root: Path, machine: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """They run in order in one session, and leave the pictures and figures that they speak of."""
    session: dict[str, Any] = {}
    for heading, code in blocks(root, "python"):
        exec(compile(code, f"docs/diffusers.md: {heading}", "exec"), session)
    for name in ("lighthouse", "lighthouse-xl", "lighthouse-flux"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == (16, 16)
    strip = [np.asarray(image).astype(int) for image in session["strip"]]
    assert len(strip) == 5
    assert np.abs(strip[0] - strip[4]).max() > 3, "the ends of the strip are different adapters"
    rows = [[float(number) for number in line.split()] for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 4
    for certificate, disagreement, ess in rows:
        assert certificate > 0
        assert disagreement > 0
        assert 1 / 4 <= ess <= 1
    for name in ("painted", "filled", "noisy"):
        assert session[name].size == (16, 16)


def test_the_families_take_ten_lines_each(root: Path) -> None:
    """A practitioner's own adapters on SD 1.5, SDXL and Flux: ten lines of code at most."""
    lines = {head: code.strip().splitlines() for head, code in blocks(root, "python") if head in HEADINGS}
    assert lines.keys() == HEADINGS
    assert all(sum(bool(line.strip()) for line in code) <= 10 for code in lines.values())


def test_the_last_methods_take_no_options(root: Path, machine: None) -> None:
    """What the methods' block says of the table's last two is true: they attach like mpa-ls."""
    from dbtheory import Preference
    from scale import attach

    adapters = {"aesthetic": "loras/aesthetic.safetensors", "detail": "loras/detail"}
    for method in ("rs", "rs-factors", "mpa-ls"):
        attach(tiny.sd(), adapters, Preference({"aesthetic": 0.5, "detail": 0.5}), method=method).detach()


def test_shell_blocks(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `dblend` line runs and leaves its record and pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scale.generate, "SCORERS", {})
    tiny.sd().save_pretrained(tmp_path / "FOLDER_OR_HUB_ID")
    for seed, name in enumerate(("a.safetensors", "both.safetensors")):
        file = tiny.save_lora(tiny.sd, tmp_path / f"made-{seed}", seed) / "pytorch_lora_weights.safetensors"
        file.rename(tmp_path / name)
    tiny.save_lora(tiny.sd, tmp_path / "loras" / "detail", 9)
    lines = "".join(code for _, code in blocks(root, "sh")).replace("\\\n", " ").splitlines()
    for line in lines:
        command, *arguments = shlex.split(line)
        assert command == "dblend"
        cli.main(arguments)
        out = Path(arguments[arguments.index("--out") + 1])
        assert (out / "generation.json").is_file()
        assert len(list(out.glob("*.png"))) == 1
    assert len(lines) == 2


def test_its_flags_and_methods_exist(root: Path, capsys: pytest.CaptureFixture) -> None:
    """Every flag that the guide names is one of the command's, and the table lists every method but base."""
    from scale.methods import METHODS

    text = (root / "docs" / "diffusers.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    named = set(re.findall(r"--[a-z][a-z-]+", text))
    assert named
    assert named <= known
    assert set(re.findall(r'^\| `"([a-z-]+)"', text, re.MULTILINE)) == set(METHODS) - {"base"}
