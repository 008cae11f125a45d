"""The closeness bench runs and counts what theory says; its prototypes keep the mean that they promise."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benches import closeness, closeness_cheaper
from benches.closeness_draw import FILE, METHODS, REFERENCE, decode, draw_latents, pictures, scaled_adapters
from benches.closeness_figures import order, ratio
from benches.closeness_prototypes import SometimesExact, first
from dbtheory import ExactExperts, MeanBlend, Preference, SampledBlend
from dbtheory.blend import Step
from scale import mini
from scale.pipeline import draw, open_pipeline
from toys import get


def test_the_bench_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At tiny sizes: one evaluation a step, mpa and mpa-held's first step take 2; only mpa is at no distance."""
    options = closeness.Options(prompts=2, seeds=1, steps=(2,), etas=(1.0,), scales=(0.25, 0.125), threads=1)
    closeness.main(options, tmp_path / "figures.json")
    record = json.loads((tmp_path / "figures.json").read_text())
    rows = {row["method"]: row for row in record["settings"][0]["rows"]}
    assert rows.keys() == METHODS.keys()
    for name, row in rows.items():
        assert row["evaluations"] == {REFERENCE: 2, "mpa-held": 1.5}.get(name, 1)
        assert (row["distance"][0] == 0) == (name == REFERENCE)
        assert all(math.isfinite(mean) for mean, _ in row["rewards"].values())
    orders = record["orders"]["the first step"][1]["orders"]
    # small deltas: the soup's prediction is off by their square, the others' by themselves
    assert orders["rs"] > 1.7 > 1.5 > max(orders["base"], orders["rs-factors"])
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("low-discrepancy / iid", "smaller deltas"))


def test_the_study_runs(tmp_path: Path) -> None:
    """At tiny sizes: each candidate takes the evaluations that its schedule says, and mpa itself is at no distance."""
    names = ("mpa", "rs", "first 50 % exact, mpa-ls + held", "every 5th exact, rs + held", "unconditional rows by rs")
    options = closeness_cheaper.Options(prompts=2, steps=(4,), etas=(0.0,), only=names, threads=1)
    closeness_cheaper.main(options, tmp_path / "figures.json")
    rows = {row["candidate"]: row for row in json.loads((tmp_path / "figures.json").read_text())["settings"][0]["rows"]}
    assert {name: row["evaluations"] for name, row in rows.items()} == dict(
        zip(names, (2, 1, 1.5, 1.5, 1.5), strict=True)
    )
    assert rows["mpa"]["distance"][0] == 0 < rows["rs"]["distance"][0]


def test_latents_decode_to_the_pictures_of_the_package() -> None:
    """What is measured is what `scale.pipeline.draw` makes, bit for bit."""
    pipe, wanted = open_pipeline(mini.MODEL), pictures(2, 1)
    (_, images), *_ = draw(pipe, wanted, steps=2, guidance=mini.GUIDANCE, eta=1.0)
    assert torch.equal(decode(pipe, draw_latents(pipe, wanted, steps=2, eta=1.0).latents), images)


def test_held_offsets_keep_the_mean() -> None:
    """Over all draws the prediction's mean is DB-MPA's, at a point and a time far from the held ones, up to rounding.

    Its spread is smaller than without the offsets. Control: one expert with its held offset is off.
    """
    toy = get("ring-of-six")
    experts = ExactExperts(toy.prior, toy.rewards, toy.alpha, toy.schedule)
    preference = Preference(dict(zip(toy.rewards, (0.25, 0.75), strict=True)))
    n, name = 64, next(iter(toy.rewards))
    phase = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # a grid that meets quarters exactly
    drawn = SampledBlend(preference)
    blend = SometimesExact(preference, first(0.5), drawn, hold=True)
    earlier, later = (torch.full((n, toy.dim), value, dtype=torch.float64) for value in (0.4, 0.5))
    blend(experts, earlier, 0.5, Step(0, 2, 0.5, 0.45, phase))
    step = Step(1, 2, 0.45, 0.0, phase)
    exact = MeanBlend(preference)(experts, later, 0.45, step)
    held, plain = blend(experts, later, 0.45, step), drawn(experts, later, 0.45, step)
    torch.testing.assert_close(held.mean(0), exact[0], rtol=0, atol=1e-12)
    assert (held - exact).square().sum() < 0.5 * (plain - exact).square().sum()
    alone = experts.predict(later, 0.45, [name])[0] + blend.offsets[experts.names.index(name)]
    assert (alone.mean(0) - exact[0]).abs().max() > 1e-3


def test_smaller_adapters(tmp_path: Path) -> None:
    """A scaled adapter's delta is that many times the shipped one's; `order` reads the power off two distances."""
    for name, path in scaled_adapters(tmp_path, 0.25).items():
        shipped, scaled = (load_file(folder / FILE) for folder in (mini.ADAPTERS / name, path))
        assert shipped.keys() == scaled.keys()
        key = next(key for key in shipped if key.endswith("to_q.lora_A.weight"))
        up = key.replace("lora_A", "lora_B")
        torch.testing.assert_close(scaled[up] @ scaled[key], 0.25 * shipped[up] @ shipped[key])
    assert order((9.0, 1.0), (0.3, 0.1)) == pytest.approx(2)


def test_standard_error_of_a_ratio() -> None:
    """To first order it is the jackknife's, made without it; images of one prompt count once."""
    generator = torch.Generator().manual_seed(0)
    above, below = (1 + torch.rand(200, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    found = ratio(above, below)
    a, b = above.mean(1), below.mean(1)
    left_out = (a.sum() - a) / (b.sum() - b)
    jackknife = math.sqrt(199 / 200 * float((left_out - left_out.mean()).square().sum()))
    assert found.mean == pytest.approx(float(a.sum() / b.sum()))
    assert found.error == pytest.approx(jackknife, rel=0.01)
    doubled = ratio(above.repeat(1, 2), below.repeat(1, 2))
    assert doubled.error == pytest.approx(found.error)


@pytest.mark.parametrize(
    "wrong", [{"prompts": 1}, {"etas": (2.0,)}, {"weights": (1.0,)}, {"steps": (0,)}, {"methods": ("x",)}]
)
def test_refuses(wrong: dict) -> None:
    """Sizes that nothing can be measured with are refused before the model is opened."""
    with pytest.raises(ValueError, match=r"received|must lie"):
        closeness.Options(**wrong)
