"""Everything that `dblend toy NAME` draws and measures on one toy."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from dbtheory import GaussianMixture, tilt
from dbtheory.files import write_atomically
from dbtheory.preference import BASE
from toys.charts import error_figure
from toys.clouds import Cloud, cloud_figure
from toys.figures import save
from toys.heatmaps import regime_figure
from toys.methods import METHODS, draw_all
from toys.network import Training
from toys.problem import Budget, Problem
from toys.regimes import Cells, regime_map
from toys.registry import get
from toys.soup import NetworkExperts, train_experts
from toys.style import MARKS
from toys.sweeps import WEIGHT, measure, network_draws, plan, two_rewards
from toys.toy import Toy

LABELS = {"floor": "an independent draw of the target"} | {name: method.label for name, method in METHODS.items()}
BLENDS = (
    ("exact", "db", "ls", "ls-iid", "msdda"),
    ("piecewise", "quadratic", "corrected", "network-db", "soup"),
)
SHORT = {"db": "DB-MPA", "corrected": "corrected"}  # in a panel, where one preference is at stake
TRAINING_TICK = 100  # training steps that count as one draw


def run(
    name: str,
    out: Path,
    *,
    samples: int = 4000,
    steps: int = 60,
    seed: int = 0,
    training: Training | None = None,
    cells: Cells | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure the toy `name` and draw its figures into the folder `out/name`, with all numbers in `toy.json`.

    `clouds.png`: the exact laws and every method's samples side by side, with distances (one or two dimensions).
    `errors.png`: errors along weight, KL scale, alpha, steps, dimension and conflict of the rewards.
    `regimes.png`: each method's error over alpha and conflict, and the method to take (two dimensions, priors that
    are mixtures). `progress(done, total)` counts draws and hundreds of training steps. Raises ValueError for an
    unknown toy.

    Returns a JSON-able dict: toy, dim, rewards, alpha, discretisation_error, samples, steps, seed, clouds, sweeps,
    regimes (None where there is none), skipped (what, and why) and figures (their paths).
    """
    toy = get(name)
    # a grid costs many times a small mixture: fewer samples, so that it takes minutes and not an hour
    budget = Budget(samples if isinstance(toy.prior, GaussianMixture) else max(1, samples // 4), steps, seed)
    training = replace(training or Training(), seed=seed)
    cells = cells or Cells()
    skipped = _skipped(toy)
    ticks = _Ticks(progress, _total(toy, budget, training, cells, skipped))
    networks = _networks(toy, training, ticks)
    figures: dict[str, Figure] = {}

    clouds, rows = _clouds(toy, budget, networks, ticks, with_panels="clouds" not in skipped)
    if rows:
        figures["clouds"] = cloud_figure(rows, f"{name}: samples over the exact density (grey), w = {WEIGHT}")
    sweeps = [measure(sweep, ticks) for sweep in plan(toy, budget, networks)]
    figures["errors"] = error_figure(sweeps, LABELS, f"{name}: error of each method along one variable at a time")
    regimes = None
    if "regimes" not in skipped:
        small = _ensemble(training)
        regimes = regime_map(toy, networks.states[BASE], budget, small, cells, ticks, ticks.training)
        figures["regimes"] = regime_figure(
            regimes, LABELS, f"{name}: errors over α and the angle between rewards, w = {WEIGHT}"
        )
    folder = Path(out) / name
    paths = {what: str(save(figure, folder / f"{what}.png")) for what, figure in figures.items()}
    result = {
        "toy": name,
        "dim": toy.dim,
        "rewards": list(two_rewards(toy)),
        "alpha": toy.alpha,
        "discretisation_error": toy.discretisation_error,
        "samples": budget.samples,
        "steps": steps,
        "seed": seed,
        "clouds": clouds,
        "sweeps": sweeps,
        "regimes": regimes,
        "skipped": skipped,
        "figures": paths,
    }
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / "toy.json", lambda path: path.write_text(text, encoding="utf-8"))
    return result | {"json": str(folder / "toy.json")}


def _networks(toy: Toy, training: Training, ticks: "_Ticks") -> NetworkExperts:
    targets = {reward: tilt(toy.prior, toy.rewards[reward], toy.alpha) for reward in two_rewards(toy)}
    return train_experts(toy.prior, targets, toy.schedule, training, ticks.training)


def _clouds(
    toy: Toy, budget: Budget, networks: NetworkExperts, ticks: "_Ticks", with_panels: bool
) -> tuple[dict[str, Any], list[list[Cloud]]]:
    """The distances at w = 0.3, and the panels: the exact laws first, then the blends."""
    first, second = two_rewards(toy)
    problem = Problem(toy, {first: WEIGHT, second: 1 - WEIGHT}, networks=networks)
    draws, refused = draw_all(problem, [name for row in BLENDS for name in row], budget, ticks)
    errors = problem.distances(draws, budget)
    measured = {"w": WEIGHT, "errors": errors, "refused": refused}
    if not with_panels:
        return measured, []

    def panel(name: str) -> Cloud:
        return Cloud(
            SHORT.get(name, LABELS[name]), f"W₂ {errors[name]:.3f}", MARKS[name].colour, draws[name], problem.target
        )

    blends = [[panel(name) for name in row if name in draws] for row in BLENDS]
    return measured, [_laws(problem, budget, errors["floor"]), *blends]


def _laws(problem: Problem, budget: Budget, floor: float) -> list[Cloud]:
    """The base, each expert's law and the target, by exact draws."""
    first, second = problem.weights
    laws = problem.experts().targets
    titles = {BASE: "base", first: f"expert {first}", second: f"expert {second}"}
    panels = [(title, "exact draws", laws[name]) for name, title in titles.items()]
    panels.append((f"target, w = {WEIGHT}", f"exact draws, floor {floor:.3f}", problem.target))
    generator, ink = torch.Generator().manual_seed(budget.seed), MARKS["exact"].colour
    return [Cloud(title, note, ink, law.sample(budget.samples, generator), law) for title, note, law in panels]


def _skipped(toy: Toy) -> dict[str, str]:
    skipped = {}
    if toy.dim > 2:
        skipped["clouds"] = f"samples in {toy.dim} dimensions do not fit on paper"
    if toy.dim != 2:
        skipped["regimes"] = "the angle between two rewards is varied on a plane"
    elif not isinstance(toy.prior, GaussianMixture):
        skipped["regimes"] = "its hundreds of draws would take too long on a grid"
    return skipped


def _ensemble(training: Training) -> Training:
    """Of the map's many networks, each has a smaller share of the time."""
    return replace(training, batch=max(1, training.batch // 2), expert_steps=max(1, training.expert_steps // 2))


def _total(toy: Toy, budget: Budget, training: Training, cells: Cells, skipped: dict[str, str]) -> int:
    draws = sum(map(len, BLENDS)) + sum(sweep.draws for sweep in plan(toy, budget)) + network_draws()
    trained: Sequence[int] = (training.base_steps, training.expert_steps)
    if "regimes" not in skipped:
        draws += cells.draws
        trained = (*trained, _ensemble(training).expert_steps)
    return draws + sum(trained) // TRAINING_TICK


class _Ticks:
    """Turns draws and training steps into one count."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self.progress, self.total, self.done, self.trained = progress, total, 0, 0

    def __call__(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)

    def training(self) -> None:
        self.trained += 1
        if self.trained % TRAINING_TICK == 0:
            self()
