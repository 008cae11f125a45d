"""Where one call of a pipeline stands, read from its scheduler: diffusers tells a denoiser the timestep alone."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dbtheory.blend import Step
from scale.levels import parametrization_of, schedule_of, times_of, told_timesteps


class Trajectory:
    """One call of a pipeline, from its first evaluation on: the steps, and each row's phase.

    The step is what the scheduler's own `step` has been called for, so a pipeline may evaluate its denoiser twice a
    step (true guidance of Flux), and start in the middle of the schedule (img2img).
    """

    def __init__(self, scheduler: Any, denoiser: Any, x: Tensor, t: Tensor) -> None:
        self.scheduler, self.timesteps = scheduler, scheduler.timesteps
        # once a call: a step must not wait for the device
        self.listed = told_timesteps(scheduler, denoiser)
        self.times = times_of(scheduler).tolist()
        schedule = schedule_of(scheduler)
        # what a prediction says of the score; None where the noise levels are unknown
        self.levels = None if schedule is None else (schedule, parametrization_of(scheduler))
        self.phase = phases(x)
        self.index = self._position(t)
        self.evaluations, self.told = 0, t  # in this step, and for which timestep

    def includes(self, scheduler: Any, t: Tensor) -> bool:
        """Whether an evaluation at the denoiser's timestep `t` belongs here: each call sets the timesteps anew."""
        if scheduler.timesteps is not self.timesteps or self.index >= len(self.times):
            return False
        if self.evaluations and t is not self.told and not torch.equal(t, self.told):
            # a loop that steps without its scheduler, and may have begun again
            position = self._position(t)
            self.index, self.evaluations, begun = position, 0, position < self.index
            return not begun
        return True

    def evaluate(self, x: Tensor, t: Tensor) -> Step:
        """The step that an evaluation at `x`, for the denoiser's timestep `t`, belongs to."""
        self.evaluations, self.told = self.evaluations + 1, t
        if len(self.phase) != len(x):  # a callback has turned guidance on or off: the same images, twice or once
            self.phase = self.phase.repeat(len(x) // len(self.phase) + 1)[: len(x)]
        t_next = self.times[self.index + 1] if self.index + 1 < len(self.times) else 0.0
        return Step(self.index, len(self.times), self.times[self.index], t_next, self.phase)

    def advance(self) -> None:
        """The scheduler has stepped."""
        self.index, self.evaluations = self.index + 1, 0

    def _position(self, t: Tensor) -> int:
        """The index of the timestep nearest to the denoiser's, which may be rounded."""
        told = float(t.flatten()[0])
        return min(range(len(self.listed)), key=lambda k: abs(self.listed[k] - told))


class Watch:
    """Stands between pipelines and their schedulers' `step`, from the first evaluation on until `release`."""

    def __init__(self, around: Callable[..., Any]) -> None:
        """`around(step, scheduler, *args, **kwargs)` is called in place of every watched scheduler's `step`."""
        self.around = around
        self.watched: list[Any] = []

    def add(self, scheduler: Any) -> None:
        """Watch a scheduler; once is enough. Its class and its configuration stay as they are."""
        if not any(scheduler is other for other in self.watched):
            self.watched.append(scheduler)
            # pipelines read the names of step's arguments, which wraps keeps
            scheduler.step = functools.wraps(scheduler.step)(functools.partial(self.around, scheduler.step, scheduler))

    def release(self) -> None:
        """Give every scheduler its own `step` back."""
        for scheduler in self.watched:
            vars(scheduler).pop("step", None)
        self.watched.clear()


def phases(x: Tensor) -> Float[Tensor, " n"]:
    """One uniform on [0, 1) a row (float64), a hash of the row's own first latents.

    So a draw depends on the image's seed alone: not on batch, order or process. The two rows that guidance makes of
    one image hold the same latents, hence follow the same experts.
    """
    rows = x.detach().to("cpu", torch.float32).flatten(1).numpy()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return torch.tensor([(int.from_bytes(digest, "big") >> 11) / 2**53 for digest in digests], dtype=torch.float64)
