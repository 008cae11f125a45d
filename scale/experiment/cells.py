"""What there is to make: cells, each a method at a preference with its images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbtheory.preference import BASE, Preference
from scale.adapters import stated_variances
from scale.experiment.config import Config
from scale.experiment.entries import STEERED, Entry
from scale.experiment.prompts import Prompt
from scale.methods import make_blender
from scale.pipeline import Picture, batches
from scale.rewards.expression import without_gradient

Weights = Mapping[str, float]
SAMPLED = ("mpa-ls", "mpa-held")  # lambda is a probability
STRIDE = 1000  # from the seeds of one prompt to the next one's


@dataclass(frozen=True)
class Cell:
    """A method with its options at one preference and lambda, and the images that it makes."""

    label: str
    method: str
    weights: Weights
    """By reward, all of them; empty for base, which follows no preference."""
    kl_scale: float | None
    options: Mapping[str, Any]
    """As `attach`, `code` or `rgg` take them."""
    adapters: Mapping[str, Path]
    """What is attached, by name."""
    prompts: Sequence[Prompt]
    seeds: int | tuple[int, ...]
    """As a config has them: `seeds_of`."""
    batch_size: int
    max_rows: int | None = None
    """Of `code` and `rgg`: how much is in memory at once; None is their own default."""

    @property
    def blend(self) -> tuple[str, Preference] | None:
        """Method and preference as `attach` takes them; None where nothing is attached."""
        if self.method == BASE or self.method in STEERED:
            return None
        if self.method == "morl":
            return "mpa", Preference(dict.fromkeys(self.adapters, 1.0))
        middle = set((self.options.get("midpoints") or {}).values())
        names = [name for name in self.adapters if name not in middle]
        return self.method, Preference({name: self.weights[name] for name in names}, self.kl_scale)

    @property
    def resamples(self) -> bool:
        return self.options.get("correct") is not None

    @property
    def pictures(self) -> list[Picture]:
        """Prompt by prompt."""
        every = enumerate(self.prompts)
        return [Picture(prompt.text, i, seed) for i, prompt in every for seed in seeds_of(self.seeds, i)]


@dataclass(frozen=True)
class Skipped:
    """What a config asks for, but a method does not have."""

    label: str
    weights: Weights
    kl_scale: float
    reason: str


def seeds_of(seeds: int | tuple[int, ...], prompt: int) -> Sequence[int]:
    """The seeds of the prompt with this index.

    A count gives each prompt its own: were noise shared, all prompts would rise and fall together, and an interval over
    prompts would not hold how much another noise changes. A tuple is for all prompts.
    """
    return range(STRIDE * prompt, STRIDE * prompt + seeds) if isinstance(seeds, int) else seeds


def plan(config: Config) -> tuple[list[Cell], list[Skipped]]:
    """The cells of a config in its order, and what it asks for in vain.

    Raises:
        ValueError: what `make_blender` and `stated_variances` refuse; images of one prompt that resampling needs
            together and a batch is too small for; nothing to make.
    """
    cells: list[Cell] = []
    skipped: list[Skipped] = []
    for entry in config.methods:
        for made in _cells(config, entry):
            (cells if isinstance(made, Cell) else skipped).append(made)  # pyright: ignore[reportArgumentType]
    for cell in cells:
        try:
            batches(cell.pictures, cell.batch_size, cell.resamples)
            if blend := cell.blend:
                make_blender(blend[0], blend[1], tuple(cell.adapters), **cell.options)
        except ValueError as error:
            raise ValueError(f"the method {cell.label} at {shown(cell)}: {error}") from error
    if not cells:
        raise ValueError(f"nothing to make: {skipped[0].label}: {skipped[0].reason}" if skipped else "no preferences")
    return cells, skipped


def shown(cell: Cell | Skipped) -> str:
    """The preference of a cell in words."""
    if cell.kl_scale is None:
        return "no preference"
    weights = " ".join(f"{name}={weight:.3g}" for name, weight in cell.weights.items() if weight)
    return f"{weights} lambda={cell.kl_scale:g}"


def _cells(config: Config, entry: Entry) -> Iterator[Cell | Skipped]:
    prompts = config.prompts[: entry.prompt_limit]
    rest = (prompts, entry.seeds or config.seeds, entry.batch_size or config.batch_size, entry.max_rows)
    if entry.method == BASE:
        yield Cell(entry.label, BASE, {}, None, {}, {}, *rest)
        return
    preferences = config.preferences if entry.preferences is None else entry.preferences
    if not preferences:
        raise ValueError(f"the config has no preferences for {entry.label}; give e.g. preferences: {{grid: 0.25}}")
    for kl_scale in entry.lambdas or config.lambdas:
        for weights in preferences:
            made = _adapters(config, entry, weights, kl_scale)
            if isinstance(made, str):
                yield Skipped(entry.label, weights, kl_scale, made)
            else:
                yield Cell(entry.label, entry.method, weights, kl_scale, _options(entry, made), made, *rest)


def _options(entry: Entry, adapters: Mapping[str, Path]) -> dict[str, Any]:
    """What an entry says, and what would else be found in files while an image is made."""
    options = dict(entry.options)
    if entry.midpoints:
        options["midpoints"] = {edge: "+".join(edge) for edge in entry.midpoints}
    if entry.method == "msdda":
        options.setdefault("variances", stated_variances(adapters))
    return options


def _adapters(config: Config, entry: Entry, weights: Weights, kl_scale: float) -> Mapping[str, Path] | str:
    """What is attached; or why the method has nothing at this preference."""
    single = [name for name, weight in weights.items() if weight == 1]
    if entry.method in STEERED:
        if kl_scale != 1:
            return f"{entry.method} knows no lambda"
        flat = [name for axis, weight in weights.items() if weight for name in without_gradient(config.rewards[axis])]
        refused = entry.method == "rgg" and flat
        return f"rgg needs the gradient of its rewards, and {' and '.join(flat)} has none" if refused else {}
    if entry.method in SAMPLED and kl_scale > 1:
        return f"{entry.method} draws one expert a step, so lambda is a probability; mpa goes above 1"
    if entry.method == "kla":
        return {single[0]: config.adapters[single[0]]} if single else "kla blends the base with one adapter"
    if entry.method != "morl":
        return {**config.adapters, **{"+".join(edge): path for edge, path in entry.midpoints.items()}}
    for expert in entry.experts:
        if expert.kl_scale == kl_scale and all(abs(expert.weights[n] - w) < 1e-9 for n, w in weights.items()):
            return {"expert": expert.adapter}
    if single and kl_scale == 1 and single[0] in config.adapters:
        return {"expert": config.adapters[single[0]]}
    return "no expert was trained for this preference"
