"""`python -m benches.closeness`: how close the methods of one evaluation come to DB-MPA, on the shipped model."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benches.closeness_draw import METHODS, REFERENCE, SHIPPED, Drawn, blended, decode, pictures, scaled_adapters
from benches.closeness_figures import Figure, Values, figure, order, ratio, rms_distance
from benches.output import JsonFile, write_record
from dbtheory.preference import Preference
from scale import mini
from scale.mini import world
from scale.pipeline import Picture, open_pipeline
from scale.rewards import SCORERS, load_scorer

LOW, IID = "mpa-ls low-discrepancy", "mpa-ls iid"
COMPARED = ("base", "rs", "rs-factors", REFERENCE)  # for smaller deltas
BOUND = 0.5  # on the distance of the low-discrepancy order, in units of the independent one's


@dataclass(frozen=True)
class Options:
    """What is drawn; the defaults are what the target is stated for."""

    prompts: int = 16
    """Held-out prompts."""
    seeds: int = 2
    """Images of each prompt."""
    steps: tuple[int, ...] = (25, 50)
    """Numbers of DDIM steps."""
    etas: tuple[float, ...] = (1.0, 0.0)
    """DDIM's eta: 1 is stochastic, 0 deterministic."""
    weights: tuple[float, ...] = (0.5,)
    """Weights of colorfulness; jpeg has the rest."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods; DB-MPA, to which all are compared, always takes part."""
    scales: tuple[float, ...] = (1.0, 0.5, 0.25)
    """Sizes of the adapters' deltas for the soups' order of agreement (the first weight and number of steps, eta 0)."""
    threads: int = torch.get_num_threads()
    """Threads."""

    def __post_init__(self) -> None:
        if unknown := set(self.methods) - set(METHODS):
            raise ValueError(f"unknown methods received: {', '.join(unknown)}; there are {', '.join(METHODS)}")
        available = len(world.held_out_prompts())
        if not 2 <= self.prompts <= available or self.seeds < 1 or self.threads < 1:
            raise ValueError(f"prompts must lie in [2, {available}], seeds and threads must be positive")
        if not all(steps > 0 for steps in self.steps) or not all(0 <= eta <= 1 for eta in self.etas):
            raise ValueError(f"steps must be positive and eta in [0, 1], received {self.steps} and {self.etas}")
        if not all(0 < w < 1 for w in self.weights) or not all(scale > 0 for scale in self.scales):
            raise ValueError(f"weights lie in (0, 1), scales are positive; received {self.weights}, {self.scales}")

    @property
    def pictures(self) -> list[Picture]:
        """The images that every method makes."""
        return pictures(self.prompts, self.seeds)


@dataclass(frozen=True)
class Row:
    """One method: its distance to DB-MPA's latents (root mean square), and its rewards; means and standard errors.

    `gains` are the rewards minus DB-MPA's, image by image: their noise is the same, so they are known better. `median`
    is the distance of half of the images: a few that end as another picture make up much of a mean.
    """

    method: str
    evaluations: float
    distance: Figure
    median: float
    rewards: Mapping[str, Figure]
    gains: Mapping[str, Figure]


def compare(
    pipe: DiffusionPipeline, options: Options, w: float, steps: int, eta: float
) -> tuple[list[Row], Figure | None]:
    """The methods at one setting, and the low-discrepancy order's distance over the independent order's."""
    chosen = [name for name in METHODS if name in (REFERENCE, *options.methods)]
    made = {method: _draw(pipe, options, method, w, steps=steps, eta=eta) for method in chosen}
    reference = made[REFERENCE].latents
    distances = {name: rms_distance(drawn.latents, reference, options.seeds) for name, drawn in made.items()}
    scores = {name: _scores(pipe, drawn.latents, options) for name, drawn in made.items()}
    rows = []
    for name, drawn in made.items():
        rewards = {reward: figure(values) for reward, values in scores[name].items()}
        gains = {reward: figure(values - scores[REFERENCE][reward]) for reward, values in scores[name].items()}
        middle = float(distances[name].median())
        rows.append(Row(name, drawn.evaluations, figure(distances[name]), middle, rewards, gains))
    return rows, ratio(distances[LOW], distances[IID]) if {LOW, IID} <= distances.keys() else None


def soup_orders(pipe: DiffusionPipeline, options: Options, take: int | None) -> list[dict[str, Any]]:
    """Distances to DB-MPA after `take` steps with smaller deltas, and the powers of their size they fall with.

    To first order in the deltas the soup of deltas is DB-MPA, so that its prediction's distance should fall as the
    square; those of the base model and of the soup of factors fall as the size itself. Latents after one step show the
    predictions alone; many steps carry small distances apart.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for scale in options.scales:
            adapters = scaled_adapters(Path(folder), scale)
            how = {"steps": options.steps[0], "eta": 0.0, "adapters": adapters, "take": take}
            made = {name: _draw(pipe, options, name, options.weights[0], **how).latents for name in COMPARED}
            away = {n: rms_distance(x, made[REFERENCE], options.seeds) for n, x in made.items() if n != REFERENCE}
            found.append({"scale": scale, "distances": {name: figure(values) for name, values in away.items()}})
    for larger, smaller in pairwise(found):
        scales = larger["scale"], smaller["scale"]
        smaller["orders"] = {
            name: order((larger["distances"][name].mean, value.mean), scales)
            for name, value in smaller["distances"].items()
        }
    return found


def _draw(pipe: DiffusionPipeline, options: Options, method: str, w: float, **how: Any) -> Drawn:
    first, second = mini.EXPERTS
    preference, adapters = Preference({first: w, second: 1 - w}), how.pop("adapters", SHIPPED)
    return blended(pipe, options.pictures, method, preference, adapters, **how)


def _scores(pipe: DiffusionPipeline, latents: Tensor, options: Options) -> dict[str, Values]:
    images, prompts = decode(pipe, latents), [picture.prompt for picture in options.pictures]
    return {
        name: load_scorer(name).score(images, prompts).detach().unflatten(0, (-1, options.seeds)) for name in SCORERS
    }


def methods_table(rows: list[Row], title: str) -> Table:
    """A line a method."""
    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    for column in ("evaluations", "distance", "median", *SCORERS):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = (str(row.rewards[name]) for name in SCORERS)
        table.add_row(row.method, f"{row.evaluations:.2f}", str(row.distance), f"{row.median:.3f}", *cells)
    return table


def orders_table(found: list[dict[str, Any]], title: str) -> Table:
    """A line a size of the deltas; in brackets the power with which a distance has fallen since the line above."""
    names = list(found[0]["distances"])
    table = Table(title=title)
    for column in ("deltas x", *names):
        table.add_column(column, justify="right")
    for line in found:
        powers = {name: f" ({value:.2f})" for name, value in line.get("orders", {}).items()}
        cells = (f"{line['distances'][name].mean:.5f}{powers.get(name, '')}" for name in names)
        table.add_row(f"{line['scale']:g}", *cells)
    return table


def measure(options: Options, console: Console) -> dict[str, Any]:
    """All settings, printed as they come: `{"environment": ..., "settings": [...], "orders": [...]}`."""
    versions = {name: version(name) for name in ("torch", "diffusers", "peft")}
    environment = {**asdict(options), "guidance": mini.GUIDANCE, "versions": versions}
    console.print(", ".join(f"{name} {value}" for name, value in environment.items()))
    started, pipe, settings = time.perf_counter(), open_pipeline(mini.MODEL), []
    for w, steps, eta in ((w, steps, eta) for w in options.weights for steps in options.steps for eta in options.etas):
        rows, share = compare(pipe, options, w, steps, eta)
        setting = {"w": w, "steps": steps, "eta": eta}
        console.print(methods_table(rows, ", ".join(f"{name} = {value:g}" for name, value in setting.items())))
        settings.append(setting | {"rows": [asdict(row) for row in rows]})
        if share is not None:
            met = share.mean <= BOUND
            verdict = "met" if met else "[red]NOT MET"
            console.print(f"{LOW} / iid: {share}, at most {BOUND:g}: {verdict}")
            settings[-1] |= {"low / iid": share, "met": met}
    orders = {}
    for take, when in ((1, "the first step"), (None, "all steps")) if options.scales else ():
        orders[when] = soup_orders(pipe, options, take)
        console.print(orders_table(orders[when], f"smaller deltas: after {when} of {options.steps[0]}, eta = 0"))
    environment["seconds"] = time.perf_counter() - started
    console.print(f"{environment['seconds']:.0f} s")
    return {"environment": environment, "settings": settings, "orders": orders}


def main(
    options: Annotated[Options, tyro.conf.OmitArgPrefixes] = Options(),
    json_file: JsonFile = None,
) -> None:
    """Prints how far each method's latents lie from DB-MPA's of the same noise, beside its rewards and its evaluations.

    Args:
        options: What is drawn.
    """
    torch.set_num_threads(options.threads)
    # a file or a pipe is 80 wide by default, and the table is not
    record = measure(options, Console(width=max(Console().width, 140)))
    write_record(json_file, record)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
