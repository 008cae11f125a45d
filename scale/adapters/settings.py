"""What the settings that come with an adapter say of its strength."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# settings of peft's LoraConfig under which B A is not what the adapter adds to a layer
UNSUPPORTED = {
    "use_dora": "a DoRA",
    "use_qalora": "a QALoRA",
    "alora_invocation_tokens": "an activated LoRA",
    "arrow_config": "a router of adapters",
    "velora_config": "a VeLoRA",
    "use_bdlora": "a block-diagonal LoRA",
    "monteclora_config": "a random LoRA",
    "layer_replication": "a LoRA of repeated layers",
}
# where the trainer began: the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA ...) changed the base model's weights
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Strength:
    """alpha of the layers whose tensors bring none: by the name of the module or its end, else for all, else rank."""

    alpha: float | None = None
    patterns: Mapping[str, float] | None = None
    rank_stabilised: bool = False

    def of(self, module: str, rank: int, own: float | None = None) -> float:
        """The alpha for which `alpha / rank` is the factor of B A in this module; `own` is its alpha tensor's value.

        Rank-stabilised adapters divide by the root of the rank: the root is returned within alpha.
        """
        named = [alpha for name, alpha in (self.patterns or {}).items() if _matches(name, module)]
        alpha = next((alpha for alpha in (own, *named, self.alpha) if alpha is not None), None)
        if alpha is None:
            return float(rank)
        return alpha * math.sqrt(rank) if self.rank_stabilised else alpha


def strength(given: Mapping[str, Any], component: str, path: Path) -> Strength:
    """The strength in the settings of a header or an `adapter_config.json`; no other setting of a stranger acts.

    Raises:
        ValueError: an alpha that is no finite number; a pattern that is no name of modules; an adapter of a kind that
            adds more than B A, or that belongs on weights which its training changed.
    """
    # diffusers' pipelines write "unet.lora_alpha", its models and peft "lora_alpha"
    scoped = {key.removeprefix(f"{component}."): v for key, v in given.items() if key.startswith(f"{component}.")}
    settings = scoped if any("." in key for key in given) else given
    _check_kind(settings, path)
    patterns = settings.get("alpha_pattern") or {}
    # peft reads patterns as regular expressions, and a stranger's may run for ever: names of modules alone pass
    if not isinstance(patterns, dict) or not all(re.fullmatch(r"\^?[\w.]+", name) for name in patterns):
        raise ValueError(f"{path} has an alpha_pattern in its settings that cannot be read: give names of modules")
    alphas = {name: _number(alpha, path) for name, alpha in patterns.items()}
    alpha = _number(settings["lora_alpha"], path) if "lora_alpha" in settings else None
    stabilised = settings.get("use_rslora") or False
    if not isinstance(stabilised, bool):
        raise ValueError(f"{path} has LoRA settings that cannot be read: use_rslora is {stabilised!r:.50}")
    return Strength(alpha, alphas, stabilised)


def _check_kind(settings: Mapping[str, Any], path: Path) -> None:
    kinds = [kind for name, kind in UNSUPPORTED.items() if settings.get(name)]
    if settings.get("peft_type", "LORA") != "LORA":
        kinds.append(f"of the type {settings['peft_type']!r:.50}")
    if kinds:
        raise ValueError(f"{path} is {kinds[0]}, which is not supported; use a plain LoRA of the denoiser")
    start = settings.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise ValueError(
            f"{path} was trained on a base model with other weights (init_lora_weights {start!r:.50}); "
            "convert it to a plain LoRA with peft's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def _number(alpha: object, path: Path) -> float:
    try:
        if isinstance(alpha, int | float) and not isinstance(alpha, bool) and math.isfinite(alpha):
            return float(alpha)
    except OverflowError:  # an integer that no float holds
        pass
    raise ValueError(f"{path} has LoRA settings that cannot be read: an alpha of {alpha!r:.50} is no finite number")


def _matches(name: str, module: str) -> bool:
    """peft's rule: a pattern is the end of a module's name at a dot, or after a caret the whole name."""
    return module == name[1:] if name.startswith("^") else f".{module}".endswith(f".{name}")
