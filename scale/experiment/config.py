"""What an experiment is: a YAML file, read strictly, with everything checked that shows without the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale import mini
from scale.adapters import adapter_file
from scale.experiment import values
from scale.experiment.entries import Entry, read_entries
from scale.experiment.prompts import Prompt, find_prompts
from scale.pipeline import DTYPES, SCHEDULERS
from scale.rewards import check_reward
from scale.rewards.expression import terms_of
from scale.train.experiment import read_table

CONFIGS = Path(__file__).parent / "configs"
FIGURES = ("pareto", "weighted", "lambda", "rewards-count", "certificate", "sheet")  # that `dblend report` draws
TABLES = ("table1", "table2", "table3", "table4", "table5", "table6", "table7")  # of the paper
NEEDS_NO_ADAPTER = ("base", "morl", "code", "rgg")


@dataclass(frozen=True)
class Config:
    """A resolved config: paths are found, defaults are filled in."""

    title: str
    rewards: Mapping[str, str]
    """Reward expression by the name of the preference's axis, r_1, r_2, ... in order."""
    prompts: tuple[Prompt, ...]
    methods: tuple[Entry, ...]
    adapters: Mapping[str, Path]
    """By axis."""
    model: str | None = None
    """A diffusers folder or hub id; None is the shipped small world."""
    also: tuple[str, ...] = ()
    """Rewards for the record only."""
    reward_models: Mapping[str, str] | None = None
    preferences: tuple[Mapping[str, float], ...] = ()
    lambdas: tuple[float, ...] = (1.0,)
    seeds: int | tuple[int, ...] = 1
    """How many of its own each prompt has; or which, for all prompts."""
    steps: int = 50
    guidance: float | None = None
    """None is the small world's, or the pipeline's own."""
    eta: float = 1.0
    scheduler: str = "ddim"
    dtype: str | None = None
    """None is float32 on the CPU and for the small world, bfloat16 on a GPU."""
    batch_size: int = 16
    figures: tuple[str, ...] = ()
    """That a report draws; all where none is named."""
    paper: tuple[str, ...] = ()
    """Tables of the paper that this is a twin of: a report shows its numbers beside theirs."""


def config_names() -> list[str]:
    """The configs that ship."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def read_config(config: str, *, small: bool = False) -> Config:
    """A shipped config by its name, or a YAML file; paths in it are relative to the working directory.

    `small` reads its twin on the small world: the keys of `mini` replace the others', and model, adapters and reward
    models are the shipped ones where it does not name them. A config of the small world is its own twin.

    Raises:
        ValueError: no such config; one that cannot be read; a key, value, file, adapter, reward or method that is
            wrong, named by config and key; no twin.
    """
    shipped = CONFIGS / f"{config}.yaml"
    path = shipped if config in config_names() else Path(config)
    if not path.is_file():
        raise ValueError(f"no config {config!r}; give a YAML file, or one of {', '.join(config_names()) or 'none'}")
    where = f"the config {path.name if path == shipped else path}"
    table = read_table(path)
    twin = table.pop("mini", None)
    if small and twin is None and table.get("model") is not None:
        raise ValueError(f"{where} has no mini: its keys would be those of the twin on the small world")
    if small and twin is not None:
        if not isinstance(twin, dict):
            raise ValueError(f"{where}: mini must be a table of the keys that it replaces, received {twin!r:.60}")
        table |= {"model": None, "adapters": None, "reward_models": None} | twin
    return _resolved(table, where)


def _resolved(table: Mapping[str, Any], where: str) -> Config:
    """The parts that need the names of the rewards come after them."""
    given = values.read(table, _PARSERS, where)
    if missing := [key for key in ("rewards", "prompts", "methods") if key not in given]:
        raise ValueError(f"{where} says nothing of {missing[0]}")
    limit, axes = given.pop("prompt_limit", None), list(given["rewards"])
    given["prompts"] = given["prompts"][:limit]
    given.setdefault("title", where)
    model = given.get("model")

    def place(text: str) -> Path:
        return find_adapter(text, model)

    later = {
        "adapters": lambda value: _adapters(value, place),
        "preferences": values.preferences(axes),
        "methods": lambda value: read_entries(value, axes, place),
    }
    given |= values.read({key: given[key] for key in later if key in given}, later, where)
    try:
        given["adapters"] = _fill_adapters(given.get("adapters", {}), given, place)
        _check_rewards(given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if len(axes) == 1:
        given.setdefault("preferences", ({axes[0]: 1.0},))
    return Config(**given)


def find_adapter(text: str, model: str | None) -> Path:
    """A shipped adapter of the small world by its name, or a path. ValueError where there is none."""
    shipped = {path.name: path for path in mini.ADAPTERS.glob("*/")} if model is None else {}
    path = shipped.get(text, Path(text))
    try:
        adapter_file(path)
    except ValueError as error:
        known = f"; those of the small world are {', '.join(sorted(shipped))}" if shipped else ""
        raise ValueError(f"{error}{known}") from error
    return path


def _adapters(value: Any, place: Any) -> dict[str, Path]:
    return {name: place(text) for name, text in values.table_of(values.text)(value).items()}


def _fill_adapters(adapters: Mapping[str, Path], given: Mapping[str, Any], place: Any) -> dict[str, Path]:
    """One adapter a reward, in the rewards' order; the small world's of the same name where none is given."""
    axes = given["rewards"]
    if unknown := [name for name in adapters if name not in axes]:
        raise ValueError(f"adapters names {unknown[0]!r}, which is no reward; the rewards are {', '.join(axes)}")
    made = {}
    needed = any(entry.method not in NEEDS_NO_ADAPTER for entry in given["methods"])
    for name in axes:
        if name in adapters:
            made[name] = adapters[name]
        elif given.get("model") is None and (mini.ADAPTERS / name).is_dir():
            made[name] = place(name)
        elif needed:
            raise ValueError(f"adapters says nothing of {name}")
    return made


def _check_rewards(given: Mapping[str, Any]) -> None:
    """Every expression is one, and every reward model belongs to one."""
    models = given.get("reward_models", {})
    if twice := [text for text in given.get("also", ()) if text in given["rewards"]]:
        raise ValueError(f"also names {twice[0]!r}, which is a reward already; leave it out")
    texts = (*given["rewards"].values(), *given.get("also", ()))
    used = {name for text in texts for _, name in terms_of(text) if name is not None}
    for name in sorted(used):
        check_reward(name, models.get(name))
    if unused := sorted(models.keys() - used):
        raise ValueError(f"reward_models names {unused[0]!r}, which no reward uses")


_PARSERS: dict[str, values.Parser] = {
    "title": values.text,
    "model": lambda value: None if values.text(value) == "none" else value,
    "rewards": values.table_of(values.text),
    "also": values.list_of(values.text),
    "reward_models": values.table_of(values.text),
    "adapters": lambda value: value,
    "prompts": find_prompts,
    "prompt_limit": values.whole(),
    "seeds": values.seeds,
    "steps": values.whole(),
    "guidance": values.number(),
    "eta": values.number(0.0, 1.0),
    "scheduler": values.one_of(SCHEDULERS),
    "dtype": values.one_of(DTYPES),
    "batch_size": values.whole(),
    "preferences": lambda value: value,
    "lambdas": values.list_of(values.number(0.0)),
    "methods": lambda value: value,
    "figures": values.list_of(values.one_of(FIGURES)),
    "paper": values.list_of(values.one_of(TABLES)),
}
