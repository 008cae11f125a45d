"""`python -m benches.core`: the core's speed and memory as ratios to its peers', measured in one run."""

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import tyro

from benches.memory import STATUS, score_memory
from benches.output import JsonFile, write_record
from benches.peers import autograd_score, jax_scores, optional, torchsde_sample, use_threads
from benches.problem import gaussian_mixture, points
from benches.timing import take_turns
from dbtheory import ExactExperts, MeanBlend, Preference, sample
from dbtheory.sampler import time_grid
from toys import get

OURS = "dbtheory"


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are what the targets are stated for."""

    points: int = 1_000_000
    """Points at which the mixture's score is evaluated."""
    components: int = 64
    """Components of that mixture."""
    dim: int = 2
    """Its dimension."""
    piece: int = 4096
    """Points at once where autograd is fastest; it also runs with all at once (4.4 GiB for a million)."""
    particles: int = 100_000
    """Samples of DB-MPA on the ring of six."""
    steps: int = 200
    """Steps of each."""
    entries: int = 100_000_000
    """Points times components of the memory measurement."""
    repeats: int = 5
    """Turns of each peer; medians are shown."""
    threads: int = torch.get_num_threads()
    """Threads of every peer."""


DEFAULTS = Sizes()


@dataclass(frozen=True)
class Row:
    """One figure, the bound on it if one is set, and what it was made from."""

    bench: str
    what: str
    value: float
    unit: str
    made_from: dict[str, float]
    bound: float | None = None
    sense: str = ">="

    @property
    def met(self) -> bool | None:
        if self.bound is None:
            return None
        return self.value >= self.bound if self.sense == ">=" else self.value <= self.bound

    def __str__(self) -> str:
        verdict = "" if self.met is None else f"{self.sense} {self.bound:g}: {'met' if self.met else 'NOT MET'}"
        details = ", ".join(f"{name} {value:.4g}" for name, value in self.made_from.items())
        return f"{self.bench:14} {self.what:48} {self.value:9.4g} {self.unit:9} {verdict:14} ({details})"


def mixture_score(sizes: Sizes) -> list[Row]:
    """Times that a peer takes as long as `GaussianMixture.score`; a peer that is not installed is left out."""
    mixture, x = gaussian_mixture(sizes.components, sizes.dim), points(sizes.points, sizes.dim)
    bounds = {"autograd": 8.0, "autograd, in pieces": 8.0, "jax": 1.0}
    whole, pieces = (autograd_score(mixture, piece) for piece in (sizes.points, sizes.piece))
    candidates = {
        OURS: lambda: mixture.score(x),
        "autograd": lambda: whole(x),
        "autograd, in pieces": lambda: pieces(x),
    }
    if _installed("jax"):
        jitted = jax_scores(mixture, piece=1024)
        array = optional("jax.numpy").asarray(x.numpy())
        candidates |= {name: lambda f=f: f(array).block_until_ready() for name, f in jitted.items()}
    return _ratios("mixture score", candidates, sizes, bounds)


def blend_sampling(sizes: Sizes) -> list[Row]:
    """DB-MPA on the ring of six by Euler-Maruyama: torchsde's time over that of `sample`, same experts."""
    toy = get("ring-of-six")
    experts = ExactExperts(toy.prior, toy.rewards, toy.alpha, toy.schedule)
    preference = Preference({name: 1 / len(toy.rewards) for name in toy.rewards})
    blender, n, times = MeanBlend(preference), sizes.particles, time_grid(toy.schedule, sizes.steps)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, toy.dim, generator=generator, dtype=torch.float64) * toy.schedule.sigma(times[0])
    candidates = {OURS: lambda: sample(experts, blender, n, sizes.steps, generator, method="euler", x_T=start)}
    if _installed("torchsde"):
        coefficients = preference.coefficients()
        candidates["torchsde"] = lambda: torchsde_sample(experts, coefficients, start, times)
    return _ratios("DB-MPA", candidates, sizes, {"torchsde": 1.0})


def memory(sizes: Sizes) -> list[Row]:
    """Growth of the peak over the memory of the responsibilities, and the whole process at `entries`."""
    if not STATUS.exists():
        print("memory is left out, as this system has no /proc")
        return []
    responsibilities = sizes.points * sizes.components * 8 / 2**20
    one = score_memory(sizes.points, sizes.components, sizes.dim)
    many = score_memory(sizes.entries // sizes.components, sizes.components, sizes.dim)
    share = one["grown_mib"] / responsibilities
    return [
        Row("memory", "growth of the peak / responsibilities", share, "x", one, 1.2, "<="),
        Row("memory", f"whole process, {sizes.entries:.0e} pairs", many["peak_mib"], "MiB", many, 2048, "<="),
    ]


def environment(sizes: Sizes) -> dict[str, Any]:
    """What the figures depend on."""
    versions = {name: version(name) for name in ("torch", "jax", "torchsde") if find_spec(name)}
    return {"device": "cpu", "dtype": "float64", "machine": platform.machine(), "versions": versions, **asdict(sizes)}


def _ratios(bench: str, candidates: dict[str, Any], sizes: Sizes, bounds: dict[str, float]) -> list[Row]:
    """Our seconds, then every peer's as a multiple of them."""
    timings = take_turns(candidates, sizes.repeats)
    ours = timings[OURS]
    rows = [Row(bench, OURS, ours.wall, "s", asdict(ours))]
    for name, peer in timings.items():
        if name != OURS:
            made_from = {**asdict(peer), "cpu_ratio": peer.cpu / ours.cpu}
            rows.append(Row(bench, name, peer.wall / ours.wall, "x as long", made_from, bounds.get(name)))
    return rows


def _installed(name: str) -> bool:
    found = find_spec(name) is not None
    if not found:
        print(f"{name} is left out, as it is not installed: pip install 'diffusion-blend[bench]'")
    return found


def main(
    sizes: Sizes = DEFAULTS,
    json_file: JsonFile = None,
) -> None:
    """Prints the core's speed and memory beside its peers', from one run.

    Args:
        sizes: What is measured.
    """
    use_threads(sizes.threads)
    facts, rows = environment(sizes), []
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for bench in (mixture_score, blend_sampling, memory):
        for row in bench(sizes):
            print(row, flush=True)
            rows.append(asdict(row) | {"met": row.met})
    write_record(json_file, {"environment": facts, "rows": rows})


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
