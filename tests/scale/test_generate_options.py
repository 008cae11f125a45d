"""`generate`: every method with its options, and what the record says of them."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import scale.generate
from scale.attachment import attach
from scale.generate import Request, generate
from scale.pipeline import draw, open_pipeline
from scale.schedules import PiecewiseLinear
from tests.scale import tiny

PROMPTS = ["a red circle", "a blue square"]
RISING, FALLING = PiecewiseLinear((0.2, 0.8)), PiecewiseLinear((0.8, 0.2))
CERTIFIED = ("certificate", "disagreement", "ess", "log_weight", "resampled")
OPTIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "mpa": {"kl_scale": 1.2},
    "kla": {"weights": {"style": 1.0}, "kl_scale": 0.5},
    "mpa-ls": {"order": "iid"},
    "mpa-held": {"exact": 0.4},
    "msdda": {"variances": {"base": 1.0, "style": 0.5, "shape": 2.0}},
    "interp": {"midpoints": {("style", "shape"): "both", ("base", "style"): "half"}},
    "rs": {"kl_scale": 0.7},
    "rs-factors": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and four adapters."""
    folder = tmp_path_factory.mktemp("files")
    tiny.sd().save_pretrained(folder / "model")
    for seed, name in enumerate(["style", "shape", "both", "half"]):
        tiny.save_lora(tiny.sd, folder / name, seed)
    return folder


@pytest.fixture(autouse=True)
def _no_scorers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale.generate, "SCORERS", {})


def request_of(folder: Path, out: Path, **changes: Any) -> Request:
    changes["midpoints"] = {edge: folder / name for edge, name in changes.pop("midpoints", {}).items()} or None
    adapters = {name: folder / name for name in ("style", "shape", "both")}
    request = Request(
        PROMPTS, {"style": 0.75, "shape": 0.25}, out, model=str(folder / "model"), adapters=adapters, steps=3, num=2
    )
    return replace(request, **changes)


def record_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def pixels(record: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(record.parent / e["file"])) for e in record_of(record)["images"]]).astype(
        int
    )


@pytest.mark.parametrize("method", OPTIONS)
def test_methods_and_their_certificates(folder: Path, tmp_path: Path, method: str) -> None:
    """Every method draws; what evaluates every expert has a certificate for each image, the others null.

    The pictures are those of `attach` with the same options, drawn by hand.
    """
    request = request_of(folder, tmp_path, method=method, **OPTIONS[method])
    record = generate(request)
    images = record_of(record)["images"]
    certified = method in ("mpa", "kla", "interp")
    for image in images:
        assert (image["certificate"] is not None) == certified
        if certified:
            assert tuple(image["certificate"]) == CERTIFIED
    pipe = open_pipeline(folder / "model")
    if request.preference is not None:
        attach(pipe, request.chosen_adapters(), request.preference, method, **request.blending)
    by_hand = torch.cat([batch for _, batch in draw(pipe, request.pictures, steps=3)])
    assert np.array_equal((255 * by_hand).round().permute(0, 2, 3, 1).numpy(), pixels(record))


def test_options_are_recorded(folder: Path, tmp_path: Path) -> None:
    """Each method's own options, and the sampler's."""
    ls = record_of(generate(request_of(folder, tmp_path / "a", method="mpa-ls", order="iid", scheduler="ddpm")))
    assert ls["options"] == {
        "order": "iid", "exact": None, "variances": None, "midpoints": {}, "correct": None, "allow_negative": False,
    }  # fmt: skip
    assert (ls["scheduler"], ls["eta"], ls["dtype"]) == ("DDPMScheduler", None, "float32")
    msdda = request_of(folder, tmp_path / "b", method="msdda", **OPTIONS["msdda"], dtype="bfloat16", max_batch=2)
    fused = record_of(generate(msdda))
    assert fused["options"]["variances"] == {"base": 1.0, "style": 0.5, "shape": 2.0}
    assert (fused["dtype"], fused["max_batch"], fused["offload"]) == ("bfloat16", 2, False)
    interp = request_of(folder, tmp_path / "c", method="interp", **OPTIONS["interp"], height=24, width=32)
    middle = record_of(generate(interp))
    assert middle["options"]["midpoints"] == {"style+shape": str(folder / "both"), "base+style": str(folder / "half")}
    assert list(middle["adapters"]) == ["style", "shape", "style+shape", "base+style"]
    assert (middle["height"], middle["width"]) == (24, 32)
    with Image.open(tmp_path / "c" / "00000-0.png") as image:
        assert image.size == (32, 24)


def test_functions_of_progress(folder: Path, tmp_path: Path) -> None:
    """The record has their text, and the coefficients at noise, half-way and data; a constant is another picture."""
    request = request_of(
        folder, tmp_path / "a", weights={"style": RISING, "shape": FALLING}, kl_scale=PiecewiseLinear((1.0, 1.5))
    )
    moving = generate(request)
    record = record_of(moving)
    assert (record["weights"], record["kl_scale"]) == ({"style": "0.2->0.8", "shape": "0.8->0.2"}, "1.0->1.5")
    expected = {
        "0": {"base": 0.0, "style": 0.2, "shape": 0.8},
        "0.5": {"base": -0.25, "style": 0.625, "shape": 0.625},
        "1": {"base": -0.5, "style": 1.2, "shape": 0.3},
    }
    assert list(record["coefficients"]) == list(expected)
    for progress, coefficients in expected.items():
        assert record["coefficients"][progress] == pytest.approx(coefficients)
    still = generate(replace(request, out=tmp_path / "b", weights={"style": 0.5, "shape": 0.5}, kl_scale=1.25))
    assert np.abs(pixels(moving) - pixels(still)).max() > 3


def test_functions_are_checked_between_the_probes(folder: Path, tmp_path: Path) -> None:
    """Weights that sum to 1 at 0, 1/2 and 1 alone, or leave the method's range between, are refused at once."""
    thirds = PiecewiseLinear((0.5, 0.9, 0.5, 0.9, 0.5))
    with pytest.raises(ValueError, match="must sum to 1"):
        request_of(folder, tmp_path, weights={"style": thirds, "shape": PiecewiseLinear((0.5, 0.5))})
    with pytest.raises(ValueError, match="mpa-ls draws one expert a step"):
        request_of(folder, tmp_path, method="mpa-ls", kl_scale=PiecewiseLinear((1.0, 1.2, 1.0, 1.2, 1.0)))
    with pytest.raises(ValueError, match="kl_scale must be at least 0"):
        request_of(folder, tmp_path, method="base", kl_scale=PiecewiseLinear((1.0, -0.2, 1.0, -0.2, 1.0)))


def test_negative_weights_must_be_allowed(folder: Path, tmp_path: Path) -> None:
    """They are refused by default; allowed, they are recorded as they are."""
    weights = {"style": 1.5, "shape": -0.5}
    with pytest.raises(ValueError, match="negative"):
        request_of(folder, tmp_path, weights=weights)
    record = record_of(generate(request_of(folder, tmp_path, weights=weights, allow_negative=True)))
    assert record["weights"] == pytest.approx(weights)
    assert record["options"]["allow_negative"] is True


def test_hashes_are_those_of_the_files(folder: Path, tmp_path: Path) -> None:
    """SHA-256 of what was loaded: the denoiser's configuration and weights, each adapter, each picture."""

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    path = generate(request_of(folder, tmp_path))
    record, unet = record_of(path), folder / "model" / "unet"
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    assert record["hashes"]["denoiser"] == {name: digest(unet / name) for name in names}
    assert record["hashes"]["adapters"] == {
        name: {"weights": digest(folder / name / "pytorch_lora_weights.safetensors")} for name in ("style", "shape")
    }
    assert [image["sha256"] for image in record["images"]] == [
        digest(tmp_path / image["file"]) for image in record["images"]
    ]


def test_only_what_the_weights_name_is_attached(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that is given but has no weight is not even read."""
    given = []

    def spy(pipe: Any, adapters: Any, *args: Any, **options: Any) -> Any:
        given.append(list(adapters))
        return attach(pipe, adapters, *args, **options)

    monkeypatch.setattr(scale.generate, "attach", spy)
    adapters = {"style": folder / "style", "other": tmp_path / "none", "more": folder / "both"}
    generate(request_of(folder, tmp_path / "out", adapters=adapters, weights={"style": 1.0}))
    assert given == [["style"]]


@pytest.mark.parametrize("method", ["mpa", "mpa-held", "interp", "msdda", "rs"])
def test_batch_size_changes_neither_picture_nor_certificate(folder: Path, tmp_path: Path, method: str) -> None:
    """One image at a time, and in forwards of two rows: equal to 1/255, certificates and ESS to 1e-3 of their size."""
    request = request_of(folder, tmp_path / "a", method=method, **{"num": 3} | OPTIONS[method])
    together = generate(request)
    for name, changes in {"b": {"batch_size": 1}, "c": {"max_batch": 2}, "d": {"batch_size": 4}}.items():
        other = generate(replace(request, out=tmp_path / name, **changes))
        assert np.abs(pixels(together) - pixels(other)).max() <= 1
        for mine, its in zip(record_of(together)["images"], record_of(other)["images"], strict=True):
            if mine["certificate"] is not None:
                assert its["certificate"].pop("resampled") == mine["certificate"].pop("resampled") == []
                assert its["certificate"] == pytest.approx(mine["certificate"], rel=1e-3, abs=1e-9)


def test_resampling_keeps_the_images_of_a_prompt_together(folder: Path, tmp_path: Path) -> None:
    """They depend on each other, so a smaller batch is refused; whole prompts to a batch change nothing."""
    request = request_of(folder, tmp_path / "a", correct="resample", num=3, steps=5, kl_scale=1.5)
    together = generate(request)
    apart = generate(replace(request, out=tmp_path / "b", batch_size=4))
    assert np.abs(pixels(together) - pixels(apart)).max() <= 1
    resampled = [image["certificate"]["resampled"] for image in record_of(together)["images"]]
    assert any(resampled), "the control: some group was resampled"
    assert record_of(together)["options"]["correct"] == "resample"
    with pytest.raises(ValueError, match="must be in one batch, received batch_size 2; use at least 3"):
        replace(request, batch_size=2)
    with pytest.raises(ValueError, match="'a red circle' is given twice"):
        replace(request, prompts=[*PROMPTS, PROMPTS[0]])
    for method in ("mpa-ls", "rs", "rs-factors"):
        with pytest.raises(ValueError, match=f"resampling needs every expert at every step, received .*{method}"):
            replace(request, method=method, kl_scale=1.0)


def test_base_ignores_the_other_methods_options(folder: Path, tmp_path: Path) -> None:
    """One word turns a command line into its comparison: base takes every flag of the others."""
    changes = {"weights": {"nobody": 7.0}, "variances": {"x": 1.0}, "midpoints": OPTIONS["interp"]["midpoints"]}
    plain = generate(request_of(folder, tmp_path / "a", method="base"))
    flags = generate(
        request_of(folder, tmp_path / "b", method="base", correct="resample", order="iid", batch_size=1, **changes)
    )
    assert np.abs(pixels(plain) - pixels(flags)).max() <= 1
    assert record_of(flags)["options"] == record_of(plain)["options"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "soup"}, "unknown method 'soup'"),
        ({"order": "sobol", "method": "mpa-ls"}, "order must be"),
        ({"order": "iid"}, "order belongs to the method mpa-ls"),
        ({"exact": 0.5}, "exact belongs to the method mpa-held"),
        ({"exact": float("nan"), "method": "mpa-held"}, "exact is the share of steps"),
        ({"variances": {"base": 1.0}}, "variances belongs to the method msdda"),
        ({"variances": {"base": 1.0}, "method": "msdda"}, "style"),
        ({"midpoints": {("style", "shape"): "both"}}, "midpoints belongs to the method interp"),
        ({"method": "interp"}, "give --midpoint"),
        ({"midpoints": {("style", "x"): "both"}, "method": "interp"}, "an edge joins two of"),
        ({"correct": "reweigh"}, "unknown correct 'reweigh'"),
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"dtype": "float64"}, "unknown dtype 'float64'"),
        ({"scheduler": "heun"}, "unknown scheduler 'heun'"),
        ({"height": 0}, "height must be a positive multiple of 8"),
        ({"width": 20}, "width must be a positive multiple of 8"),
    ],
)
def test_wrong_options_are_refused(folder: Path, tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    """A ValueError when the request is made, so before anything is loaded."""
    with pytest.raises(ValueError, match=reason):
        request_of(folder, tmp_path, **changes)


def test_a_midpoint_and_an_adapter_of_one_name_are_refused(folder: Path, tmp_path: Path) -> None:
    """A midpoint's adapter is named by its edge."""
    weights = {"style": 0.5, "shape": 0.25, "style+shape": 0.25}
    adapters = dict.fromkeys(weights, folder / "both")
    with pytest.raises(ValueError, match="style\\+shape names an adapter and a midpoint"):
        request_of(
            folder,
            tmp_path,
            weights=weights,
            adapters=adapters,
            method="interp",
            midpoints={("style", "shape"): "both"},
        )


def test_too_little_memory_says_what_to_do(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not even one row fits, the remedy is named."""

    def draw_out_of_memory(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setattr(scale.generate, "draw", draw_out_of_memory)
    with pytest.raises(ValueError, match="too little memory; use a smaller batch_size"):
        generate(request_of(folder, tmp_path))


@pytest.mark.parametrize("family", [tiny.sdxl, tiny.sd3, tiny.flux])
def test_the_other_families(tmp_path: Path, family: Any) -> None:
    """SDXL, SD3 and Flux from their folders, with an adapter each: pictures, certificates, hashes."""
    family().save_pretrained(tmp_path / "model")
    targets = tiny.LINEAR if family is tiny.sdxl else tiny.MMDIT
    for seed, name in enumerate(["a", "b"]):
        tiny.save_lora(family, tmp_path / name, seed, targets)
    request = Request(
        PROMPTS, {"a": RISING, "b": FALLING}, tmp_path / "out", model=str(tmp_path / "model"), steps=2, height=16,
        width=16, adapters={"a": tmp_path / "a", "b": tmp_path / "b"},
    )  # fmt: skip
    record = record_of(generate(request))
    assert len(record["images"]) == 2
    assert all(image["certificate"]["disagreement"] > 0 for image in record["images"])
    assert len(record["hashes"]["denoiser"]) == 2
    assert record["guidance"] == {tiny.sdxl: 5.0, tiny.sd3: 7.0, tiny.flux: 3.5}[family]
