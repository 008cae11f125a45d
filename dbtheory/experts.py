"""What blenders and samplers see of a model: denoisers that share their shape and parametrisation."""

from collections.abc import Mapping, Sequence
from typing import cast, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

# python 3.11's own work every property out to see whether it is there
from typing_extensions import Protocol, runtime_checkable

from dbtheory.law import Law
from dbtheory.parametrization import Parametrization, convert
from dbtheory.preference import BASE
from dbtheory.reward import Reward
from dbtheory.schedule import NoiseSchedule
from dbtheory.tilt import tilt

# One point a row: toys have events (d,), images (channels, height, width).
Points = Float[Tensor, "n *event"]


@runtime_checkable
class Experts(Protocol):
    """Denoisers of the base model and of its aligned versions; conditioning is bound before.

    `names[0]` is "base". Predictions are in `parametrization`, at times t in (0, 1] with 0 = data and 1 =
    noise.
    """

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def schedule(self) -> NoiseSchedule: ...
    @property
    def parametrization(self) -> Parametrization: ...
    @property
    def event_shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...

    def predict(self, x: Points, t: Tensor | float, names: Sequence[str]) -> Tensor:
        """Every named expert at every point: `x (n, *event)` -> `(len(names), n, *event)`."""
        ...

    def predict_each(self, x: Points, t: Tensor | float, assignment: Int64[Tensor, " n"]) -> Points:
        """One expert a point: `assignment (n,)` indexes `names`; `x (n, *event)` -> `(n, *event)`."""
        ...


class ExactExperts:
    """The exact experts: the law `prior`, and `prior exp(r / alpha) / Z` for each of `rewards` (`dbtheory.tilt`).

    `targets` holds these laws by name, "base" first. Mixtures tilted by quadratic rewards are closed forms; other
    rewards, and priors on a grid, are exact up to each target's `discretisation_error`.

    Raises:
        ValueError: no rewards, a reward named "base", alpha <= 0, a tilt that is no distribution or has no grid, or
            an unknown parametrisation; at a call, an unknown name or an assignment out of range.
    """

    def __init__(
        self,
        prior: Law,
        rewards: Mapping[str, Reward],
        alpha: float,
        schedule: NoiseSchedule,
        parametrization: str = "score",
    ) -> None:
        if not rewards or BASE in rewards:
            raise ValueError(f'rewards need at least one name, none of them "{BASE}"; received {list(rewards)}')
        if parametrization not in get_args(Parametrization):
            raise ValueError(
                f"parametrization must be one of {get_args(Parametrization)}, received {parametrization!r}"
            )
        tilted = {name: tilt(prior, reward, alpha) for name, reward in rewards.items()}
        self.targets: dict[str, Law] = {BASE: prior, **tilted}
        self.names: tuple[str, ...] = tuple(self.targets)
        self.schedule: NoiseSchedule = schedule
        self.parametrization: Parametrization = cast(Parametrization, parametrization)
        self.event_shape: tuple[int, ...] = tuple(prior.mean.shape)
        self.dtype: torch.dtype = prior.mean.dtype
        self.device: torch.device = prior.mean.device

    def predict(self, x: Float[Tensor, "n d"], t: Tensor | float, names: Sequence[str]) -> Float[Tensor, "m n d"]:
        """Every named expert at every point; t in (0, 1], one for all or one a point `(n,)`."""
        unknown = [name for name in names if name not in self.targets]
        if unknown or not names:
            raise ValueError(f"no such experts: {unknown}; name at least one of {list(self.names)}")
        return torch.stack([self._prediction(name, x, t) for name in names])

    def predict_each(
        self, x: Float[Tensor, "n d"], t: Tensor | float, assignment: Int64[Tensor, " n"]
    ) -> Float[Tensor, "n d"]:
        """The assigned expert at each point: one evaluation a point, however many experts there are."""
        if assignment.shape != x.shape[:1] or assignment.is_floating_point():
            raise ValueError(
                f"assignment must hold one integer a point: {len(x)} points, received {assignment.dtype} of shape "
                f"{tuple(assignment.shape)}"
            )
        prediction = torch.empty_like(x, dtype=self.dtype)
        used = torch.unique(assignment).tolist()
        if used and not 0 <= used[0] <= used[-1] < len(self.names):
            raise ValueError(f"assignment must index the {len(self.names)} experts {self.names}, received {used}")
        times = torch.as_tensor(t)
        for index in used:
            mine = assignment == index
            prediction[mine] = self._prediction(self.names[index], x[mine], times[mine] if times.ndim else t)
        return prediction

    def _prediction(self, name: str, x: Tensor, t: Tensor | float) -> Tensor:
        score = self.targets[name].noised(self.schedule, t).score(x)
        return convert(score, x, t, self.schedule, source="score", target=self.parametrization)
