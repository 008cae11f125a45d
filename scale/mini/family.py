"""The family of experts on the small world: which rewards, in which mixtures, at which KL strength."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from scale.train.settings import MINI, Dpok

# symmetry, in [-1, 1], is brought to alignment's [-2, 2], as the paper brings VILA's
SCALES = {"alignment": 1.0, "colorfulness": 1.0, "symmetry": 2.0, "jpeg": 1.0}


@dataclass(frozen=True)
class Expert:
    """One member: its preference over the scaled rewards, and the KL scale lambda, which divides alpha."""

    weights: Mapping[str, float]
    kl_scale: float = 1.0

    @property
    def reward(self) -> str:
        """The expression that it is trained on."""
        return " + ".join(f"{w * SCALES[name]:.12g}*{name}" for name, w in self.weights.items())

    def settings(self, common: Dpok = MINI) -> Dpok:
        """Everything but alpha is common to the family: seeds, prompts and budget, so that comparisons are fair."""
        return replace(common, alpha=common.alpha / self.kl_scale)


def _mixed(first: str, second: str, percent: int) -> dict[str, Expert]:
    weights = {first: percent / 100, second: 1 - percent / 100}
    return {f"{first}{percent}-{second}{100 - percent}": Expert(weights)}


def _uniform(*names: str) -> dict[str, Expert]:
    return {"-".join(names): Expert({name: 1 / len(names) for name in names})}


def _scaled(name: str, percent: int) -> dict[str, Expert]:
    return {f"{name}-lambda{percent}": Expert({name: 1.0}, percent / 100)}


SINGLE = {name: Expert({name: 1.0}) for name in SCALES}
FAMILY: dict[str, Expert] = {
    **SINGLE,
    # MORL, the retrained answer to a preference; its middle is also what interpolation needs
    **{k: v for percent in (20, 50, 80) for k, v in _mixed("alignment", "colorfulness", percent).items()},
    **{k: v for percent in (50, 150) for k, v in _scaled("alignment", percent).items()},
    **{k: v for percent in (20, 50, 80) for k, v in _mixed("colorfulness", "jpeg", percent).items()},
    **{k: v for percent in (20, 70, 200) for k, v in _scaled("alignment", percent).items()},
    **_uniform("alignment", "colorfulness", "jpeg"),
    **_uniform(*SCALES),
}
"""By name, percent in the names: `alignment20-colorfulness80` has w = 0.2, `alignment-lambda50` lambda = 0.5."""
