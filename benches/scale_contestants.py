"""Who takes part in `benches.scale`: plain diffusers, the methods of `attach`, and the reference's design."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo as dynamo
from diffusers import UNet2DConditionModel
from torch import Tensor

from benches.scale_models import ARCHITECTURES, inputs, load, pipeline, sharing
from dbtheory import Preference
from scale import attach

PLAIN, REFERENCE = "plain", "reference"
# what the blenders are called here -> the method of `attach`
BLENDS = {
    "base": "base",
    "mpa": "mpa",
    "mpa sequential": "mpa",
    "mpa-ls": "mpa-ls",
    "mpa-held": "mpa-held",
    "rs": "rs",
}
METHODS = (PLAIN, *BLENDS, REFERENCE)
# mpa-held evaluates all experts in a fifth of the steps, which two steps do not have
DEFAULT = tuple(method for method in METHODS if method != "mpa-held")


@dataclass(frozen=True)
class Task:
    """Which images are made, by what model."""

    model: str = "sd15"
    """sd15, sdxl, or tiny for a try."""
    steps: int = 2
    """Of denoising, an image."""
    batch: int = 1
    """Images in one call of the pipeline."""
    latents: int = 32
    """Side of the latents, an eighth of the image's: SD1.5 was trained on 64, SDXL on 128."""
    guidance: float = 1.0
    """Above 1 every image is evaluated twice."""
    rank: int = 4
    """Of the adapters."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    device: str = "cpu"
    """cpu or cuda."""
    compiled: str | None = None
    """A mode of torch.compile, such as default or reduce-overhead (CUDA graphs); None is eager."""

    @property
    def rows(self) -> int:
        """Rows of one model's evaluation: guidance above 1 evaluates every image twice."""
        return self.batch * (2 if self.guidance > 1 else 1)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass
class Probe:
    """What the denoiser did: forwards, their rows, and seconds inside the forwards and inside the blend around them.

    With `device` a GPU, its queue is emptied at both ends of what is timed.
    """

    device: str
    forwards: int = 0
    rows: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "blend": 0.0})

    def reset(self) -> None:
        """Count from here."""
        self.forwards, self.rows, self.seconds = 0, 0, dict.fromkeys(self.seconds, 0.0)

    def watch(self, forward: Callable[..., Any], what: str) -> Callable[..., Any]:
        """The same function, timed and, where it is the denoiser's own forward, counted."""

        def watched(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            start = self._now()
            result = forward(sample, *args, **kwargs)
            self.seconds[what] += self._now() - start
            if what == "forward":
                self.forwards, self.rows = self.forwards + 1, self.rows + len(sample)
            return result

        return watched

    @property
    def overhead(self) -> float:
        """Seconds of the blend beside the forwards, as a share of the forwards'."""
        return (self.seconds["blend"] - self.seconds["forward"]) / self.seconds["forward"]

    def _now(self) -> float:
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()


class Contestant:
    """A pipeline that makes images by one method with `m` adapters, ready to run.

    `unets` hold the weights: one, or `m` for the reference's design. They are shared, not changed. With a probe, it
    watches the denoiser; the first name of `paths` is plain's adapter.
    """

    def __init__(
        self,
        task: Task,
        method: str,
        unets: Sequence[UNet2DConditionModel],
        paths: Mapping[str, Path],
        probe: Probe | None = None,
    ) -> None:
        self.task = task
        self.unets = [sharing(task.model, unet) for unet in unets]
        self.pipe = pipeline(task.model, self.unets[0])
        self.call = inputs(task.model, self.unets[0], task.batch, task.latents)
        if probe:
            for unet in self.unets:
                unet.forward = probe.watch(unet.forward, "forward")
        if method == PLAIN:
            name, path = next(iter(paths.items()))
            load(self.pipe, path, name)
        elif method == REFERENCE:
            average(self.unets, [pipeline(task.model, unet) for unet in self.unets], paths)
        else:
            self.knob = attach(self.pipe, paths, equal(paths), BLENDS[method], **options(task, method))
        if probe:
            self.unets[0].forward = probe.watch(self.unets[0].forward, "blend")
        if task.compiled:
            # contestants run the same code with different graphs, and one that fell back to eager would go unnoticed
            dynamo.config.recompile_limit, dynamo.config.fail_on_recompile_limit_hit = 256, True
            self.unets[0].compile(mode=task.compiled)

    def __call__(self) -> Tensor:
        """Latents of the images `(batch, 4, side, side)`; on a GPU, once they are there."""
        images = self.pipe(
            **self.call,
            num_inference_steps=self.task.steps,
            guidance_scale=self.task.guidance,
            eta=1.0,
            generator=torch.Generator(self.task.device).manual_seed(1),
            output_type="latent",
        ).images
        if self.task.device != "cpu":
            torch.cuda.synchronize()
        return images


def equal(names: Mapping[str, Path]) -> Preference:
    """The same weight for every adapter."""
    return Preference({name: 1 / len(names) for name in names})


def options(task: Task, method: str) -> dict[str, Any]:
    """How `attach` is told to evaluate the experts one after the other."""
    return {"max_batch": task.rows} if method == "mpa sequential" else {}


def average(unets: Sequence[UNet2DConditionModel], pipes: Sequence[Any], paths: Mapping[str, Path]) -> None:
    """The reference's design: each of m whole models has its own adapter; the first answers with their mean."""
    for pipe, (name, path) in zip(pipes, paths.items(), strict=True):
        load(pipe, path, name)
    forwards = [unet.forward for unet in unets]

    def averaged(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        return (torch.stack([forward(*args, **kwargs)[0] for forward in forwards]).mean(0),)

    unets[0].forward = averaged


def known(model: str, methods: Sequence[str], adapters: Sequence[int]) -> None:
    """ValueError for a model, method or number of adapters that there is not."""
    for kind, received, there in (("model", [model], ARCHITECTURES), ("method", methods, METHODS)):
        unknown = [name for name in received if name not in there]
        if unknown:
            raise ValueError(f"no {kind} is called {', '.join(unknown)}; there are {', '.join(there)}")
    if not adapters or min(adapters) < 1:
        raise ValueError(f"adapters must be numbers from 1 up, received {list(adapters)}")
