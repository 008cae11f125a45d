"""What a run shows while it lasts: a progress bar, TensorBoard's curves, and sheets of sample images."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import tensorboard  # noqa: F401 (the tracker loads it after the first round, which is late to hear that it is missing)
import torch
from accelerate import PartialState
from accelerate.tracking import TensorBoardTracker
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from dbtheory.files import write_atomically
from scale.progress import progress_bar
from scale.train.policy import Policy

SHEET = 8  # images
COLUMNS = 4
NOTED = ("reward", "kl", "ratio", "gradient", "loss")


class Observer:
    """Called after every round with its number and record; it acts on the main process alone.

    `total` is the number of rounds. Every `sheet_every` of them (0: never) a sheet of `SHEET` images, always of the
    same prompts and noise, goes into `work`; `sheet-00000.png` is the base model's.
    """

    def __init__(
        self, policy: Policy, prompts: Sequence[str], work: Path, total: int, sheet_every: int = 0, batch: int = SHEET
    ) -> None:  # fmt: skip
        self.policy, self.work, self.total, self.sheet_every, self.batch = policy, work, total, sheet_every, batch
        self.prompts = list(islice(cycle(prompts), SHEET))
        self.acts = PartialState().is_main_process
        self.tracker: TensorBoardTracker | None = None
        self.bar = progress_bar()

    def __enter__(self) -> "Observer":
        if self.acts:
            self.bar.start()
            self.task = self.bar.add_task("rounds", total=self.total, note="")
            if self.sheet_every and not self._sheet(0).exists():
                self.draw(0)
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        if self.tracker is not None:
            self.tracker.finish()

    def __call__(self, index: int, record: Mapping[str, float]) -> None:
        if not self.acts:
            return
        done = index + 1
        note = " ".join(f"{name} {record[name]:.3g}" for name in NOTED if name in record)
        self.bar.update(self.task, completed=done, note=note)
        if self.tracker is None:
            # a resumed run replaces the rounds after its checkpoint
            self.tracker = TensorBoardTracker("logs", self.work, purge_step=done)
            self.tracker.start()
        self.tracker.log(dict(record), step=done)
        if self.sheet_every and (done % self.sheet_every == 0 or done == self.total):
            self.draw(done)

    def draw(self, done: int) -> None:
        """Write the sheet after `done` rounds."""
        images = torch.cat(list(self._images()))
        pixels = (255 * sheet(images, COLUMNS)).round().byte().permute(1, 2, 0).cpu().numpy()
        write_atomically(self._sheet(done), lambda path: Image.fromarray(pixels).save(path))

    def _images(self) -> Iterator[Tensor]:
        for start in range(0, SHEET, self.batch):
            prompts = self.prompts[start : start + self.batch]
            seeds = range(start, start + len(prompts))
            yield self.policy.rollout(prompts, [torch.Generator().manual_seed(seed) for seed in seeds]).images

    def _sheet(self, done: int) -> Path:
        return self.work / f"sheet-{done:05d}.png"


def sheet(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Images (n, 3, H, W), n a multiple of `columns`, as one (3, rows (H + gap), columns (W + gap)), row by row."""
    framed: Any = pad(images, (0, gap, 0, gap), value=1.0).unflatten(0, (-1, columns))
    return framed.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
