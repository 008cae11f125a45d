"""The benches run, and their peers compute what we compute; how fast anything is, is never asserted."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benches.core import Sizes, main
from benches.peers import autograd_score, jax_scores, torchsde_sample
from benches.problem import gaussian_mixture, points
from dbtheory import ExactExperts, MeanBlend, Preference, sample
from dbtheory.sampler import time_grid
from toys import get

TINY = Sizes(points=300, components=3, piece=100, particles=50, steps=4, entries=900, repeats=2, threads=1)


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch):
    """What a bench sets for its process is put back."""
    before = torch.get_num_threads()
    monkeypatch.setenv("NPROC", "1")
    yield
    torch.set_num_threads(before)


def test_every_bench_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At tiny sizes: figures of all three, finite and not negative, on screen and in the file with their sizes."""
    main(TINY, tmp_path / "figures.json")
    record = json.loads((tmp_path / "figures.json").read_text())
    assert {row["bench"] for row in record["rows"]} >= {"mixture score", "DB-MPA"}
    assert all(math.isfinite(row["value"]) and row["value"] >= 0 for row in record["rows"])
    assert (record["environment"]["points"], record["environment"]["dtype"]) == (300, "float64")
    shown = capsys.readouterr().out
    assert all(row["what"] in shown for row in record["rows"])


def test_autograd_computes_the_same_score() -> None:
    """Or the ratio would compare two different things."""
    mixture, x = gaussian_mixture(5, 3), points(70, 3)
    torch.testing.assert_close(autograd_score(mixture, piece=32)(x), mixture.score(x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["jax", "jax, our pieces and order"])
def test_jax_computes_the_same_score(name: str) -> None:
    """Both formulas, with a last piece that is shorter than the others."""
    jnp = pytest.importorskip("jax.numpy")
    mixture, x = gaussian_mixture(5, 3), points(70, 3)
    got = jax_scores(mixture, piece=32)[name](jnp.asarray(x.numpy()))
    torch.testing.assert_close(
        torch.tensor(got.tolist(), dtype=torch.float64), mixture.score(x), rtol=1e-11, atol=1e-12
    )


def test_torchsde_takes_the_same_steps() -> None:
    """Driven by the same Brownian path, its Euler is our Euler-Maruyama: same drift, diffusion and times."""
    torchsde = pytest.importorskip("torchsde")
    toy, n, steps = get("ring-of-six"), 20, 10
    experts = ExactExperts(toy.prior, toy.rewards, toy.alpha, toy.schedule)
    preference, times = Preference({"east": 0.3, "north": 0.7}), time_grid(toy.schedule, steps)
    start, noise = points(n, 2), points(steps * n, 2).reshape(steps, n, 2)

    class Given(torchsde.BaseBrownian):
        dtype, device, shape, levy_area_approximation = start.dtype, start.device, start.shape, "none"

        def __call__(self, ta: Tensor, tb: Tensor, return_U: bool = False, return_A: bool = False) -> Tensor:
            return noise[round(float(ta) * steps)] * float(tb - ta) ** 0.5

        def __repr__(self) -> str:
            return "increments that were drawn before"

    got = torchsde_sample(experts, preference.coefficients(), start, times, bm=Given())
    ours = sample(
        experts, MeanBlend(preference), n, steps, method="euler", x_T=start, noise=noise, phase=noise[0, :, 0]
    )
    torch.testing.assert_close(got, ours, rtol=1e-9, atol=1e-9)
