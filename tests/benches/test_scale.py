"""The scale bench runs on a tiny model, counts what theory says, and its contestants compute the same; no timing."""

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benches import scale, scale_child, scale_profile
from benches.scale import Options, main
from benches.scale_contestants import METHODS, Contestant, Probe, Task
from benches.scale_layer import BARE, OURS, candidates, shapes
from benches.scale_models import random_unet, save_adapters, skeleton
from benches.scale_report import targets

TINY = Task(model="tiny", latents=8, steps=3)
ADAPTERS = 3


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_adapters("tiny", tmp_path_factory.mktemp("adapters"), ADAPTERS, rank=4)


def contestant(method: str, paths: dict[str, Path], task: Task = TINY, probe: Probe | None = None) -> Contestant:
    unets = [random_unet(task.model, task.torch_dtype, task.device) for _ in paths]
    return Contestant(task, method, unets if method == "reference" else unets[:1], paths, probe)


@pytest.mark.parametrize(("model", "count"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_the_denoisers_have_the_real_sizes(model: str, count: int) -> None:
    """As many parameters as the checkpoints of Stable Diffusion 1.5 and of SDXL base have."""
    assert sum(parameter.numel() for parameter in skeleton(model).parameters()) == count


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("method", METHODS)
def test_evaluations_are_what_theory_says(method: str, guidance: float, paths: dict[str, Path]) -> None:
    """A step takes one model's rows; m times them for mpa (at once, in turn), mpa-held's first, the reference."""
    task = replace(TINY, guidance=guidance, batch=2)
    probe = Probe("cpu")
    contestant(method, paths, task, probe)()
    rows = task.batch * (2 if guidance > 1 else 1)
    forwards = task.steps * (ADAPTERS if method in ("mpa sequential", "reference") else 1)
    exact = {"mpa": task.steps, "mpa sequential": task.steps, "reference": task.steps, "mpa-held": 1}  # steps of all m
    models = task.steps + (ADAPTERS - 1) * exact.get(method, 0)
    assert (probe.forwards, probe.rows) == (forwards, models * rows)
    assert probe.seconds["blend"] > probe.seconds["forward"] > 0


def test_contestants_make_the_same_images(paths: dict[str, Path]) -> None:
    """The reference's design, mpa at once and mpa in turn agree: their cost is compared. Control: the rest differ."""
    images = {method: contestant(method, paths)() for method in METHODS}
    for method in ("mpa", "mpa sequential"):
        torch.testing.assert_close(images[method], images["reference"], rtol=1e-5, atol=1e-5)
    for method in ("plain", "base", "mpa-ls", "mpa-held", "rs"):
        assert (images[method] - images["reference"]).abs().max() > 1e-3


def test_one_adapter_is_plain_diffusers(paths: dict[str, Path]) -> None:
    """With one adapter mpa and mpa-ls are diffusers' own images, bit for bit, so their ratio to plain is fair."""
    one = dict(list(paths.items())[:1])
    plain = contestant("plain", one)()
    assert all(torch.equal(contestant(method, one)(), plain) for method in ("mpa", "mpa-ls"))


@pytest.mark.parametrize("rank", [4, 64])
def test_ways_through_a_layer_agree(rank: int) -> None:
    """Stacked products, peft's mixed batch and the loop give one answer; control: the layer without adapters."""
    ways = candidates(shapes("tiny", 8)[0], ADAPTERS, rank, torch.float32, "cpu")
    answers = {name: way() for name, way in ways.items()}
    bare = answers.pop(BARE)
    for answer in answers.values():
        torch.testing.assert_close(answer, answers[OURS], rtol=1e-5, atol=1e-5)
        assert (answer - bare).abs().max() > 1e-2


@pytest.mark.slow
def test_every_part_of_the_bench_runs(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    """At tiny sizes, each contestant observed in this process: all figures finite, on screen and in the file."""
    monkeypatch.setattr(scale_child, "observe", lambda task, method, m, threads: scale_child.measure(task, method, m))
    main(Options(task=TINY, adapters=(1, 2), repeats=1, threads=torch.get_num_threads()), tmp_path / "figures.json")
    record = json.loads((tmp_path / "figures.json").read_text())
    figures = {(figure.pop("method"), figure.pop("adapters")): figure for figure in record["figures"]}
    assert set(figures) == {
        ("plain", 1), ("base", 1), ("mpa sequential", 2),
        *((method, m) for method in ("mpa", "mpa-ls", "rs", "reference") for m in (1, 2)),
    }  # fmt: skip
    assert all(math.isfinite(value) for figure in figures.values() for value in figure.values())
    assert figures["mpa", 2]["rows"] == 2 * figures["plain", 1]["rows"] == 2 * TINY.steps
    assert figures["reference", 2]["parameters_mib"] == pytest.approx(2 * figures["plain", 1]["parameters_mib"])
    assert figures["mpa", 2]["parameters_mib"] < 1.1 * figures["plain", 1]["parameters_mib"]
    assert {row["bench"] for row in record["rows"]} == {"time", "overhead", "memory", "switch"}
    assert record["environment"]["model"] == "tiny"
    assert {layer["adapters"] for layer in record["layers"]} == {2}
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("mpa sequential", "reference", "set_adapters", "one layer"))


def test_a_contestant_is_observed_in_a_process_of_its_own() -> None:
    """The child counts what this process would count, and its peak is its own: more than the weights, finite."""
    found = scale_child.observe(TINY, "mpa", 2, threads=1)
    assert (found["forwards"], found["rows"]) == (TINY.steps, 2 * TINY.steps)
    assert found["parameters_mib"] <= found["held_mib"] < found["peak_mib"] < 4096


def test_a_child_that_fails_says_why(monkeypatch) -> None:
    """An error in the child is an error here, with its message."""
    failed = subprocess.CompletedProcess([], returncode=1, stdout="", stderr="no memory")
    monkeypatch.setattr(scale_child.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"mpa with 2 adapters failed:\nno memory"):
        scale_child.observe(TINY, "mpa", 2, threads=1)


def test_bounds_are_judged() -> None:
    """A figure above its bound is not met, one below is, and the reference's memory has no bound."""
    memory = {"parameters_mib": 100.0, "held_mib": 100.0, "peak_mib": 100.0}
    figures = {
        ("mpa", 1): memory,
        ("mpa-ls", 4): {"ratio": 1.04, "cpu_ratio": 1.0, "seconds": 1.0, "overhead": 0.01},
        ("mpa sequential", 4): {key: 1.01 * value for key, value in memory.items()} | {"peak_mib": 103.0},
        ("reference", 1): memory,
        ("reference", 4): {key: 4 * value for key, value in memory.items()},
    }
    met = {row.what: row.met for row in targets(figures, TINY)}
    assert met == {
        "mpa-ls, m = 4": True,
        "parameters: mpa sequential, m = 4": True,
        "held: mpa sequential, m = 4": True,
        "peak: mpa sequential, m = 4": False,
        "parameters: reference, m = 4": None,
        "held: reference, m = 4": None,
        "peak: reference, m = 4": None,
    }
    assert [row.met for row in targets(figures, TINY) if row.bench == "time"] == [False]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"methods": ("mpa", "soup")}, "no method is called soup"),
        ({"adapters": (0,)}, "adapters must be numbers from 1 up"),
        ({"parts": ("layers",)}, "no part is called layers"),
        ({"task": replace(TINY, model="sd3")}, "no model is called sd3"),
        ({"task": replace(TINY, latents=7)}, "latents must be a multiple of 2"),
    ],
)
def test_wrong_options_are_refused(wrong: dict, message: str) -> None:
    """Before long work, with what was wrong."""
    with pytest.raises(ValueError, match=message):
        Options(**({"task": TINY} | wrong))


def test_models_that_do_not_fit_are_left_out(monkeypatch, capsys: pytest.CaptureFixture) -> None:
    """The reference's design needs m models in memory: where they do not fit, a line says so and the rest runs."""
    monkeypatch.setattr(scale, "room_for", lambda *_: 2)
    keys = scale.fitting([("mpa", 4), ("reference", 2), ("reference", 4)], TINY, scale.Console())
    assert keys == [("mpa", 4), ("reference", 2)]
    assert "reference with 4 models is left out" in capsys.readouterr().out


def test_the_profile_divides_an_image_into_its_parts(capsys: pytest.CaptureFixture) -> None:
    """Its parts are those of one image, and stacked products appear among the operators beyond plain's."""
    scale_profile.main(scale_profile.Options(task=TINY, operators=40, threads=torch.get_num_threads()))
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("pipeline and scheduler", "adapters in the layers", "aten::bmm"))
