"""Scoring and writing finished batches, in one thread beside the generation of the next."""

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from scale.experiment.jobs import Batch
from scale.experiment.make import Made
from scale.experiment.store import Store
from scale.rewards.protocol import Scorer

IN_FLIGHT = 2  # batches whose images wait in memory


class Recorder:
    """Takes batches as they are made. An error of its thread is raised at the next `submit` or `wait`."""

    def __init__(self, store: Store, scorers: Mapping[str, Scorer], facts: Mapping[str, Any]) -> None:
        self.store, self.scorers, self.facts = store, scorers, facts
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._pool = ThreadPoolExecutor(1, "recorder", initializer=_begin_thread, initargs=(device,))
        self._pending: deque[Future[None]] = deque()

    def submit(self, batch: Batch, made: Made) -> None:
        """Score and write a batch in the background; waits while too many are in flight.

        Raises:
            ValueError: a scorer that failed; the message names it.
            OSError: a batch that could not be written.
        """
        self._pending.append(self._pool.submit(self._record, batch, made))
        self.wait(IN_FLIGHT)

    def wait(self, left: int = 0) -> None:
        """Until at most `left` batches are in flight; raises what `submit` does."""
        while len(self._pending) > left:
            self._pending.popleft().result()

    def close(self) -> None:
        """Wait for all that is in flight, whether or not it can be written."""
        self._pool.shutdown(wait=True)

    @torch.no_grad()
    def _record(self, batch: Batch, made: Made) -> None:
        pixels = (255 * made.images).round().byte()
        prompts = [picture.prompt for picture in batch.pictures]
        # of the file's pixels, so that anybody has the same from the file
        scores = {name: score(name, scorer, pixels, prompts) for name, scorer in self.scorers.items()}
        rows = [
            {"rewards": {name: scores[name][i] for name in scores}, "certificate": certificate}
            for i, certificate in enumerate(made.certificates)
        ]
        record = {"cost": made.cost, **self.facts}
        self.store.write(batch, pixels.permute(0, 2, 3, 1).contiguous(), record, rows)


def score(
    name: str, scorer: Scorer, pixels: UInt8[Tensor, "n 3 height width"], prompts: Sequence[str]
) -> list[float | None]:
    """One number an image, or None where the scorer does not know its prompt; ValueError where it fails."""
    known = [i for i, prompt in enumerate(prompts) if scorer.knows(prompt)]
    try:
        values = scorer.score(pixels[known] / 255, [prompts[i] for i in known]).tolist()
    except Exception as error:  # a scorer is anybody's code
        raise ValueError(f"the reward {name} ({scorer.name}) failed: {error or type(error).__name__}") from error
    found: list[float | None] = [None] * len(prompts)
    for i, value in zip(known, values, strict=True):
        found[i] = value
    return found


def _begin_thread(device: int | None) -> None:
    """A thread has a current GPU of its own, and here also a queue: scoring need not wait for the generation."""
    if device is not None:
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream())
