"""The toy half of `dblend demo`: how far blends are from the exact target, where that target is known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbtheory import ExactExperts, MeanBlend, Preference, SampledBlend, sample, tilt
from dbtheory.blend import Blender
from dbtheory.law import Law
from dbtheory.metrics import sliced_w2
from dbtheory.sampler import time_grid
from toys.figures import Panel, cloud_grid, save
from toys.registry import get
from toys.toy import Toy

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
REFERENCES = 4
METHODS = ("exact", "mpa", "mpa-ls", "mpa-ls-iid")
COLUMNS = {"floor": "exact target", "exact": "exact drift", "mpa": "DB-MPA", "mpa-ls": "DB-MPA-LS"}


def run(
    out: Path,
    *,
    samples: int = 10_000,
    steps: int = 150,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Sliced W2 to the exact target for each preference and method; writes `toy.png` into the folder `out`.

    Each row is a weight w of the first reward (the second has 1 - w). "floor" is the distance of two
    independent draws of the target; "exact" runs the drift of the combined reward itself, so that what it
    adds to the floor is the discretisation; all methods share their starting points and noise.
    `progress(done, total)` counts sampler steps.

    Returns a JSON-able dict: toy, rewards, alpha, samples, steps, seed, rows (one a w) and figure (its path).
    """
    toy = get("ring-of-six")
    ticks = _Ticks(progress, len(WEIGHTS) * len(METHODS) * steps)
    rows, clouds = [], {}
    for w in WEIGHTS:
        target, references, draws = _draws(toy, w, samples, steps, seed, ticks)
        distances = {name: _distance(draw, references) for name, draw in draws.items()}
        rows.append({"w": w, **distances})
        clouds[f"w = {w:g}"] = target, [Panel(draws[name], _note(name, distances)) for name in COLUMNS]
    first, second = toy.rewards
    title = f"{w_label(first, second)}: samples over the exact target's density (grey)"
    figure = save(cloud_grid(clouds, list(COLUMNS.values()), title, half_width=4.0), Path(out) / "toy.png")
    return {
        "toy": toy.name,
        "rewards": [first, second],
        "alpha": toy.alpha,
        "samples": samples,
        "steps": steps,
        "seed": seed,
        "rows": rows,
        "figure": str(figure),
    }


def w_label(first: str, second: str) -> str:
    """How the combined reward is written in titles and tables."""
    return f"reward $w$ {first} + $(1 - w)$ {second}"


def _draws(
    toy: Toy, w: float, samples: int, steps: int, seed: int, ticks: "_Ticks"
) -> tuple[Law, list[Tensor], dict[str, Tensor]]:
    """The exact target of weight w, reference draws of it, and the draws to be judged: floor and methods."""
    first, second = toy.rewards
    combined = w * toy.rewards[first] + (1 - w) * toy.rewards[second]
    target = tilt(toy.prior, combined, toy.alpha)
    generator = torch.Generator().manual_seed(seed)
    references = [target.sample(samples, generator=generator) for _ in range(REFERENCES)]
    draws = {"floor": target.sample(samples, generator=generator)}

    preference = Preference({first: w, second: 1 - w})
    blended = ExactExperts(toy.prior, toy.rewards, toy.alpha, toy.schedule)
    exact = ExactExperts(toy.prior, {"combined": combined}, toy.alpha, toy.schedule)
    plan: dict[str, tuple[ExactExperts, Blender]] = {
        "exact": (exact, MeanBlend(Preference({"combined": 1.0}))),
        "mpa": (blended, MeanBlend(preference)),
        "mpa-ls": (blended, SampledBlend(preference)),
        "mpa-ls-iid": (blended, SampledBlend(preference, order="iid")),
    }
    # steps crowd towards the data, where the score changes fastest
    grid = time_grid(toy.schedule, steps, power=2.0)
    for name, (experts, blender) in plan.items():
        noise = torch.Generator().manual_seed(seed + 1)
        draws[name] = sample(experts, blender, samples, steps, noise, method="euler", grid=grid, progress=ticks)
    return target, references, draws


def _distance(draw: Tensor, references: list[Tensor]) -> float:
    """Sliced W2 to the target, averaged over draws of it: rare modes make a single one noisy."""
    return sum(sliced_w2(draw, reference, projections=64) for reference in references) / len(references)


def _note(name: str, distances: dict[str, float]) -> str:
    return f"floor {distances[name]:.3f}" if name == "floor" else f"W₂ {distances[name]:.3f}"


class _Ticks:
    """Turns the steps of many samplers into one count."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, _done: int, _steps: int) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)
