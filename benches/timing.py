"""Medians of peers that take turns, so that a slow minute of the machine is slow for all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Medians over the repeats, in seconds: by the clock, and of all the process's threads together."""

    wall: float
    cpu: float


def take_turns(candidates: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Times every candidate `repeats` times, one after the other, after one untimed turn each (compilation)."""
    for run in candidates.values():
        run()
    turns = [{name: _timed(run) for name, run in candidates.items()} for _ in range(repeats)]
    return {
        name: Timing(
            wall=statistics.median(turn[name].wall for turn in turns),
            cpu=statistics.median(turn[name].cpu for turn in turns),
        )
        for name in candidates
    }


def _timed(run: Callable[[], object]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Timing(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)
