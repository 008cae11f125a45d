"""A shared scorer gives its scorer's answers, to one thread at a time."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from scale.rewards.colorfulness import Colorfulness
from scale.rewards.protocol import Mix, Scorer
from scale.rewards.shared import Shared
from tests.scale.rewards.pictures import PROMPTS, blocks


class Busy(Scorer):
    """Notes how many threads are in it."""

    name, batch_size = "busy", 1

    def __init__(self) -> None:
        self.inside, self.most, self._lock = 0, 0, threading.Lock()

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        time.sleep(0.01)
        with self._lock:
            self.inside -= 1
        return images.mean((1, 2, 3))


def crowd(scorer: Scorer) -> list[Tensor]:
    """What four threads are told at once."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda _: scorer.score(blocks(), PROMPTS), range(4)))


def test_it_answers_one_thread_after_the_other() -> None:
    """Never two inside, whatever it is a part of; without it there are (the control)."""
    busy = Busy()
    shared = Shared(busy)
    for scorer in (shared, Mix([(1.0, shared)])):
        assert all(torch.equal(scores, blocks().mean((1, 2, 3))) for scores in crowd(scorer))
        assert busy.most == 1
    crowd(busy)
    assert busy.most > 1


def test_it_is_its_scorer() -> None:
    """Scores, gradients, name, range, files, and what it knows."""
    own = 2 * Colorfulness() - 1
    shared = Shared(own)
    images = blocks().requires_grad_()
    gradients = [torch.autograd.grad(scorer.score(images, PROMPTS).sum(), images)[0] for scorer in (own, shared)]
    assert torch.equal(*gradients)
    assert bool(gradients[0].any())
    assert torch.equal(own.score(blocks(), PROMPTS), shared.score(blocks(), PROMPTS))
    assert (shared.name, shared.range, shared.differentiable) == (own.name, own.range, own.differentiable)
    assert shared.files == own.files
    assert shared.knows("anything")
