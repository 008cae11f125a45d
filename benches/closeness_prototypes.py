"""Cheaper ways to DB-MPA that were tried: blenders that evaluate all experts at some steps only."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import get_protocol_members

from dbtheory.blend import Blender, MeanBlend, SampledBlend, Step, combine
from dbtheory.experts import Experts, Points
from dbtheory.preference import Preference
from scale.soup import SoupBlend

# whether all experts are evaluated at a step, by its index and the number of steps
Schedule = Callable[[int, int], bool]


def first(share: float) -> Schedule:
    """The steps nearest to noise."""
    return lambda index, count: index < share * count


def last(share: float) -> Schedule:
    """The steps nearest to data."""
    return lambda index, count: index >= (1 - share) * count


def every(period: int) -> Schedule:
    """The first step, and then each period's."""
    return lambda index, count: index % period == 0


class Moved:
    """Experts whose answers are moved: those of one expert a row by `offsets (m, n, *event)`, a soup's by `soup`."""

    def __init__(self, experts: Any, offsets: Tensor, soup: Tensor | None) -> None:
        self.experts, self.offsets, self.soup = experts, offsets, soup
        for name in get_protocol_members(Experts) - set(dir(self)):
            setattr(self, name, getattr(experts, name))

    def predict_each(self, x: Points, t: Tensor | float, assignment: Tensor) -> Points:
        rows = torch.arange(len(x), device=x.device)
        return self.experts.predict_each(x, t, assignment) + self.offsets[assignment, rows]

    def predict_soup(self, x: Points, t: Tensor | float, *how: Any) -> Points:
        return self.experts.predict_soup(x, t, *how) + self.soup


@dataclass
class SometimesExact:
    """DB-MPA at the steps of `exact`; elsewhere the blender `cheap`, with one evaluation.

    With `hold`, what `cheap` lacked at the last exact step is added. For one drawn expert i that is mpa - e_i: over the
    draws the offsets cancel, however old they are, so that the mean stays DB-MPA's and only the spread shrinks, as
    control variates do in SVRG (Johnson and Zhang, 2013).
    """

    preference: Preference
    exact: Schedule
    cheap: Blender
    hold: bool = False
    offsets: Tensor = field(default_factory=lambda: torch.empty(0))
    soup: Tensor | None = None

    def __call__(self, experts: Any, x: Points, t: Tensor | float, step: Step) -> Points:
        if not self.exact(step.index, step.count):
            held: Any = Moved(experts, self.offsets, self.soup) if self.hold else experts
            return self.cheap(held, x, t, step)
        coefficients = {name: c for name, c in self.preference.coefficients(step.progress).items() if c != 0}
        names = [name for name in experts.names if name in coefficients]
        predictions = experts.predict(x, t, names)
        blended = combine(predictions, [coefficients[name] for name in names])
        if self.hold:
            self.offsets = blended.new_zeros(len(experts.names), *blended.shape)
            self.offsets[[experts.names.index(name) for name in names]] = blended - predictions
        if self.hold and isinstance(self.cheap, SoupBlend):
            self.soup = blended - self.cheap(experts, x, t, step)
        return blended


@dataclass
class OnceUnconditional:
    """All experts at the conditional rows, which guidance puts second; `cheap` at the unconditional ones."""

    preference: Preference
    cheap: Blender

    def __call__(self, experts: Any, x: Points, t: Tensor | float, step: Step) -> Points:
        n = len(x) // 2
        phase = step.phase[:n]
        half = Step(step.index, step.count, step.t, step.t_next, phase)
        blenders = (self.cheap, MeanBlend(self.preference))
        halves = [
            blender(_rows(experts, len(x), rows), x[rows], t, half)
            for blender, rows in zip(blenders, (slice(n), slice(n, None)), strict=True)
        ]
        return torch.cat(halves)


def _rows(experts: Any, total: int, rows: slice) -> Any:
    """The experts under the conditioning of some of the rows."""
    given = {
        name: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == total else value
        for name, value in experts.conditioning.items()
    }
    return experts.bind(timestep=experts.timestep, **given)


def candidates(preference: Preference) -> dict[str, Blender]:
    """What is compared, by name. Beyond lambda = 1 no expert can be drawn, and the soup alone is cheap."""
    soup = SoupBlend(preference)
    schedules = {
        "first 10 %": first(0.1), "first 20 %": first(0.2), "first 30 %": first(0.3), "first 50 %": first(0.5),
        "last 20 %": last(0.2), "last 50 %": last(0.5), "every 5th": every(5), "every 10th": every(10),
    }  # fmt: skip
    found: dict[str, Blender] = {"mpa": MeanBlend(preference), "rs": soup}
    found |= {f"{name} exact, rs": SometimesExact(preference, steps, soup) for name, steps in schedules.items()}
    held = {name: steps for name, steps in schedules.items() if not name.startswith("last")}
    found |= {f"{name} exact, rs + held": SometimesExact(preference, steps, soup, True) for name, steps in held.items()}
    found["unconditional rows by rs"] = OnceUnconditional(preference, soup)
    if float(preference.kl_scale) > 1:  # pyright: ignore[reportArgumentType] (a number here)
        return found
    drawn = SampledBlend(preference)
    found |= {"mpa-ls iid": SampledBlend(preference, "iid"), "mpa-ls": drawn}
    found |= {f"{name} exact, mpa-ls": SometimesExact(preference, steps, drawn) for name, steps in schedules.items()}
    found |= {
        f"{name} exact, mpa-ls + held": SometimesExact(preference, steps, drawn, True) for name, steps in held.items()
    }
    found["unconditional rows by mpa-ls"] = OnceUnconditional(preference, drawn)
    return found
