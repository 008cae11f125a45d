"""A scorer that two threads may ask."""

import sys
import threading
from collections.abc import Sequence

from torch import Tensor

from scale.rewards.protocol import Images, Scorer


class Shared(Scorer):
    """Another scorer, which answers one thread after the other: what it is need not bear two."""

    runs_on = "anywhere"
    batch_size = sys.maxsize

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.name, self.range = scorer, scorer.name, scorer.range
        self.differentiable, self.files = scorer.differentiable, scorer.files
        self._lock = threading.Lock()

    def _score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        with self._lock:
            return self.scorer.score(images, prompts)

    def knows(self, prompt: str) -> bool:
        """Whether it can score images of this prompt."""
        return self.scorer.knows(prompt)
