"""Steps counted by watching schedulers: whatever loop calls the denoiser, and however often a step."""

import inspect

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler

from scale.mini import components
from scale.trajectory import Trajectory, Watch, phases
from tests.scale import tiny

X = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def ddim(steps: int = 5) -> DDIMScheduler:
    scheduler = components.scheduler()
    scheduler.set_timesteps(steps)
    return scheduler


def watched(scheduler) -> tuple[Trajectory, Watch]:
    """A trajectory that a watch on its scheduler advances."""
    trajectory = Trajectory(scheduler, None, X, scheduler.timesteps[0])

    def around(step, _, *args, **kwargs):
        result = step(*args, **kwargs)
        trajectory.advance()
        return result

    watch = Watch(around)
    watch.follow(scheduler)
    return trajectory, watch


@pytest.mark.parametrize("evaluations", [1, 2, 3])
@pytest.mark.parametrize("kind", [DDIMScheduler, PNDMScheduler, HeunDiscreteScheduler])
def test_a_step_is_what_the_scheduler_steps(kind: type, evaluations: int) -> None:
    """However often the denoiser is evaluated at a step, and though Heun and PNDM repeat timesteps, steps count up."""
    scheduler = kind.from_config(components.scheduler().config)
    scheduler.set_timesteps(5)
    trajectory, _ = watched(scheduler)
    x, seen = X, []
    for t in scheduler.timesteps:
        for _ in range(evaluations):
            assert trajectory.includes(scheduler, t.clone())
            step = trajectory.evaluate(X, t.clone())
        seen.append((step.index, step.count, step.t))
        x = scheduler.step(X, t, x, return_dict=False)[0]
    count = len(scheduler.timesteps)
    times = [(float(t) + 1) / 1000 for t in scheduler.timesteps]
    assert [index for index, _, _ in seen] == list(range(count))
    assert {n for _, n, _ in seen} == {count}
    assert [t for _, _, t in seen] == pytest.approx(times)
    assert not trajectory.includes(scheduler, scheduler.timesteps[0])  # it is over


def test_a_call_may_start_in_the_middle() -> None:
    """img2img skips the first steps: the index is the timestep's place in the schedule; Flux is told sigma."""
    scheduler = ddim(10)
    assert Trajectory(scheduler, None, X, scheduler.timesteps[4]).index == 4
    assert Trajectory(scheduler, None, X, scheduler.timesteps[9]).index == 9
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(10)
    sd3, flux = tiny.sd3().transformer, tiny.flux().transformer
    for k, t in enumerate(flow.timesteps):
        assert Trajectory(flow, sd3, X, t).index == k
        assert Trajectory(flow, flux, X, t[None] / 1000).index == k


def test_a_loop_without_its_scheduler_is_followed_by_its_timesteps() -> None:
    """A loop that never calls `step` counts by what it tells the denoiser, and a second run is another trajectory."""
    scheduler = ddim()
    trajectory = Trajectory(scheduler, None, X, scheduler.timesteps[0])
    indices = []
    for t in scheduler.timesteps:
        assert trajectory.includes(scheduler, t)
        indices.append(trajectory.evaluate(X, t).index)
    assert indices == [0, 1, 2, 3, 4]
    assert not trajectory.includes(scheduler, scheduler.timesteps[0])


def test_new_timesteps_are_a_new_trajectory() -> None:
    """A pipeline sets its scheduler's timesteps at each call, equal ones too; so does one that an exception ended."""
    scheduler = ddim()
    trajectory = Trajectory(scheduler, None, X, scheduler.timesteps[0])
    trajectory.evaluate(X, scheduler.timesteps[0])
    assert trajectory.includes(scheduler, scheduler.timesteps[0])
    scheduler.set_timesteps(5)
    assert not trajectory.includes(scheduler, scheduler.timesteps[0])


def test_times_end_at_the_data() -> None:
    """Steps carry t in (0, 1], falling, and the last one's t_next is 0."""
    scheduler = ddim()
    trajectory, _ = watched(scheduler)
    spans = []
    for t in scheduler.timesteps:
        step = trajectory.evaluate(X, t)
        spans.append((step.t, step.t_next))
        scheduler.step(X, t, X)
    assert all(late > early >= 0 for late, early in spans)
    assert [early for _, early in spans[:-1]] == [late for late, _ in spans[1:]]
    assert spans[-1][1] == 0.0


def test_a_watch_changes_nothing_but_the_calls_it_sees() -> None:
    """Watched twice is watched once; the arguments that pipelines look up stay; released, nothing is left."""
    scheduler, calls = ddim(), []

    def around(step, seen, *args, **kwargs):
        calls.append(seen)
        return step(*args, **kwargs)

    before = inspect.signature(scheduler.step)
    watch = Watch(around)
    watch.follow(scheduler)
    watch.follow(scheduler)
    assert inspect.signature(scheduler.step) == before
    expected = ddim().step(X, 800, X).prev_sample
    assert torch.equal(scheduler.step(X, 800, X).prev_sample, expected)
    assert calls == [scheduler]
    assert dict(scheduler.config) == dict(ddim().config)
    watch.release()
    assert "step" not in vars(scheduler)
    scheduler.step(X, 800, X)
    assert calls == [scheduler]


def test_phases_are_uniform_and_differ() -> None:
    """The hash of the first latents is a uniform on [0, 1) that tells images apart and repeats itself."""
    x = torch.randn(500, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    phase = phases(x)
    assert torch.equal(phase, phases(x))
    assert len(phase.unique()) == 500
    assert 0.4 < float(phase.mean()) < 0.6
    assert float(phase.min()) >= 0
    assert float(phase.max()) < 1
