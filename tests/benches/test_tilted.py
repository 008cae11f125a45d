"""The bench of reward-weighted denoising runs, and its figures are those of weights made by hand."""

import json
from pathlib import Path

import pytest
import torch

from benches import tilted
from benches.tilted import Options
from scale.mini.family import SINGLE


def test_the_bench_runs(tmp_path: Path) -> None:
    """At a tiny size: a row for every reward and alpha, from one effective sample to all of them as alpha grows."""
    options = Options(prompts=2, samples=3, steps=2, alphas=(1e-6, 1e6), threads=1)
    tilted.main(options, tmp_path / "figures.json")
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [(row["reward"], row["alpha"]) for row in rows] == [(name, a) for name in SINGLE for a in options.alphas]
    assert [row["effective"] for row in rows] == pytest.approx([1, 3] * len(SINGLE), rel=1e-3)
    assert [row["starved"] for row in rows] == [1, 0] * len(SINGLE)


def test_a_row_by_hand() -> None:
    """Weights 3 : 1 of two images: (3 + 1)^2 / (9 + 1) = 1.6 effective, and 3/4 - 1/2 of the lead is gained."""
    lead = float(torch.tensor(3.0).log())
    found = tilted.row("r", torch.tensor([lead, 0.0, 5.0 + lead, 5.0], dtype=torch.float64), 2, 1.0)
    assert found.effective == pytest.approx(1.6)
    assert found.starved == 1
    assert found.gain == pytest.approx(lead / 4)
    assert found.spread == pytest.approx(lead / 2**0.5)


@pytest.mark.parametrize("wrong", [{"prompts": 0}, {"samples": 1}, {"alphas": (0.0,)}])
def test_refuses(wrong: dict) -> None:
    """Sizes that tell nothing are refused before the model is opened."""
    with pytest.raises(ValueError, match="must be positive"):
        Options(**wrong)
