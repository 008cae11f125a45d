"""What to train: the settings of an algorithm from a preset, a config file and single values, every one checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from scale.adapters.card import yaml_danger

CONFIGS = Path(__file__).parent / "configs"
LARGEST_CONFIG = 20_000  # bytes
ALGORITHMS = {"dpok": "scale.train.dpok", "tilted": "scale.train.tilted"}  # the modules of their `train`


@dataclass(frozen=True)
class Experiment:
    """What a config file says, under the same names; `kl_scale` is its `lambda`."""

    reward: str = ""
    model: str | None = None
    """A diffusers folder or hub id; None is the shipped small world."""
    algorithm: str = "dpok"
    preset: str = "mini"
    kl_scale: float = 1.0
    """Trains on `alpha / kl_scale`: what DB-KLA at this lambda imitates."""
    prompts: tuple[str, ...] = ()
    needs: str = ""
    """Where the config brings no prompts: which ones it was made for."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the algorithm's settings, over the preset's."""

    def make_settings(self) -> Any:
        """The settings of the run.

        Raises:
            ValueError: an unknown algorithm, preset or setting, or a value that the setting cannot have.
        """
        known = presets(self.algorithm)
        if self.preset not in known:
            raise ValueError(f"no preset {self.preset!r} of {self.algorithm}; it is one of {', '.join(known)}")
        if not 0 < self.kl_scale < math.inf:
            raise ValueError(f"lambda must be positive and finite, received {self.kl_scale}")
        settings = change(known[self.preset], self.settings)
        return replace(settings, alpha=settings.alpha / self.kl_scale)


def presets(algorithm: str) -> Mapping[str, Any]:
    """The settings that people start from, by name; ValueError for an unknown algorithm."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"no algorithm {algorithm!r}; it is one of {', '.join(ALGORITHMS)}")
    if algorithm == "dpok":
        from scale.train.settings import PRESETS

        return PRESETS
    from scale.train.tilted_settings import Tilted

    return {"mini": Tilted()}


def algorithm_of(settings: Any) -> str:
    """The name of the algorithm that settings belong to: their class, in small letters."""
    return type(settings).__name__.lower()


def trainer_of(settings: Any) -> Any:
    """The function `train` of the algorithm that settings belong to."""
    return import_module(ALGORITHMS[algorithm_of(settings)]).train


def change(settings: Any, values: Mapping[str, Any]) -> Any:
    """Settings with other values, given as text or as YAML has them.

    Raises:
        ValueError: a name that is no setting (the message lists them), or a value of another type.
    """
    kinds = get_type_hints(type(settings))
    names = [known.name for known in fields(settings)]
    if unknown := [name for name in values if name not in names]:
        raise ValueError(
            f"no setting {', '.join(map(str, unknown))} of {algorithm_of(settings)}; they are {', '.join(names)}"
        )
    return replace(settings, **{name: parse_setting(name, value, kinds[name]) for name, value in values.items()})


def parse_setting(name: str, value: object, kind: Any) -> Any:
    """A value of the type `kind`: bool, int, float, str, `tuple[str, ...]` ("a,b"), or one of them or None ("none")."""
    text = _text(value)
    if NoneType in get_args(kind):
        if text == "none":
            return None
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is tuple:
        return tuple(word.strip() for word in text.split(",") if word.strip())
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        made = kind(text)
        if kind is float and not math.isfinite(made):
            raise ValueError
    except (KeyError, ValueError) as error:
        what = {bool: "true or false", int: "a whole number", float: "a finite number"}[kind]
        raise ValueError(f"the setting {name} must be {what}, received {text!r:.50}") from error
    return made


def _text(value: object) -> str:
    """YAML's value as a command line would give it. (YAML 1.1 reads 1e-4, without a point, as a word.)"""
    if isinstance(value, list):
        return ",".join(map(_text, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, str | int | float) else type(value).__name__


def config_names() -> list[str]:
    """The configs that ship: one for each experiment of the paper."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def read_config(config: str) -> Experiment:
    """A shipped config by its name, or a YAML file.

    Raises:
        ValueError: neither; a file that cannot be read; a key that is unknown, or whose value is of another type.
    """
    shipped = CONFIGS / f"{config}.yaml"
    path = shipped if config in config_names() else Path(config)
    if not path.is_file():
        raise ValueError(f"no config {config!r}; give a YAML file, or one of {', '.join(config_names())}")
    table = read_table(path)
    settings = table.pop("settings", None) or {}
    prompts = table.pop("prompts", None) or []
    if not isinstance(settings, dict) or not isinstance(prompts, list):
        raise ValueError(f"in the config {path} settings must be a table of names and values, and prompts a list")
    if odd := [prompt for prompt in prompts if not isinstance(prompt, str) or not prompt.strip()]:
        raise ValueError(
            f"the config {path} has the prompt {odd[0]!r:.50}, which YAML reads as no text; put it in quotes"
        )
    if "lambda" in table:
        table["kl_scale"] = parse_setting("lambda", table.pop("lambda"), float)
    kinds = get_type_hints(Experiment)
    if unknown := [key for key in table if key not in kinds]:
        known = sorted({*kinds, "lambda"} - {"kl_scale"})
        raise ValueError(f"the config {path} has an unknown {unknown[0]!r:.50}; the keys are {', '.join(known)}")
    values = {name: parse_setting(name, value, kinds[name]) for name, value in table.items()}
    return Experiment(**values, prompts=tuple(prompts), settings=settings)


def read_table(path: Path) -> dict[str, Any]:
    """The table that a YAML file of a stranger holds.

    Raises:
        ValueError: a file that cannot be read or is too large, aliases or deep nesting in it, or no table.
    """
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"more than {LARGEST_CONFIG} bytes")
        text = path.read_text(encoding="utf-8")
        if danger := yaml_danger(text):
            raise ValueError(f"{danger}, which are not read")
        table = yaml.safe_load(text)
    except Exception as error:  # a hostile file can make the parser raise anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"the config {path} cannot be read: {reason:.200}") from error
    if not isinstance(table, dict):
        raise ValueError(f"the config {path} must be a table of names and values, e.g. reward: imagereward")
    return table
