"""Where one call of a pipeline stands, read from its scheduler: diffusers tells a denoiser the timestep alone."""

import copy
import functools
import hashlib
from collections.abc import Callable
from types import MethodType
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
        """The first evaluation is at `x (rows, ...)`, for the denoiser's timestep `t`."""
        self.scheduler, self.timesteps = scheduler, scheduler.timesteps
        # once a call: a step must not wait for the device
        self.listed = told_timesteps(scheduler, denoiser)
        self.times = times_of(scheduler).tolist()
        schedule = schedule_of(scheduler)
        # what a prediction says of the score; None where the noise levels are unknown
        self.levels = None if schedule is None else (schedule, parametrization_of(scheduler))
        self.phase = phases(x)
        # timesteps may repeat (Heun), and then only the scheduler knows where a call begins
        begin = getattr(scheduler, "begin_index", None)
        self.index = self._position(t) if begin is None else begin
        self.images = len(x)
        self.evaluations, self.told = 0, t  # in this step, and for which timestep

    @property
    def is_over(self) -> bool:
        """Whether its last step has been taken."""
        return self.index >= len(self.times)

    def includes(self, scheduler: Any, t: Tensor, in_pipeline: bool = True) -> bool:
        """Whether an evaluation at the denoiser's timestep `t` belongs here.

        Each call of a pipeline sets the timesteps anew; a user's own loop may begin again on the same ones.
        """
        if scheduler.timesteps is not self.timesteps or self.is_over:
            return False
        if not in_pipeline and not self.evaluations and self.listed[self.index] != self.listed[self._position(t)]:
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
    """Stands between one scheduler at a time and the pipelines that call its `step`."""

    def __init__(self, around: Callable[..., Any]) -> None:
        """`around(step, scheduler, *args, **kwargs)` is called in place of the scheduler's own `step`."""
        self.around = around
        self.watched: Watched | None = None

    def follow(self, scheduler: Any) -> None:
        """Watch this scheduler, and no other any more. Its class and its configuration stay as they are."""
        if self.watched is None or vars(scheduler).get("step") is not self.watched:
            self.release()
            self.watched = Watched(self, scheduler)
            scheduler.step = self.watched

    def release(self) -> None:
        """Give the scheduler back what it had. Beneath another blend's watch this one only falls silent."""
        watched, self.watched = self.watched, None
        if watched is None or vars(watched.scheduler).get("step") is not watched:
            return
        if watched.is_instances:
            watched.scheduler.step = watched.own
        else:
            del watched.scheduler.step


class Watched:
    """A scheduler's `step` while it is watched."""

    def __init__(self, watch: Watch, scheduler: Any) -> None:
        self.watch, self.scheduler = watch, scheduler
        self.own, self.is_instances = scheduler.step, "step" in vars(scheduler)
        functools.update_wrapper(self, self.own)  # pipelines read the names of step's arguments

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.watch.watched is not self:
            return self.own(*args, **kwargs)
        return self.watch.around(self.own, self.scheduler, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # a copied scheduler is watched by nobody, and must not copy the pipeline
        return MethodType(type(self.scheduler).step, copy.deepcopy(self.scheduler, memo))


def phases(x: Tensor) -> Float[Tensor, " n"]:
    """One uniform on [0, 1) a row (float64), a hash of the row's own first latents.

    So a draw depends on the image's seed and the latents' dtype: not on batch, order or process. The two rows that
    guidance makes of one image hold the same latents, hence follow the same experts.
    """
    rows = x.detach().to("cpu", torch.float32).flatten(1).numpy()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return torch.tensor([(int.from_bytes(digest, "big") >> 11) / 2**53 for digest in digests], dtype=torch.float64)
