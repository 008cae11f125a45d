"""What the baselines see of a model: Gaussian steps whose noise is given; and a pipeline seen so, on its own grid."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from jaxtyping import Int64
from torch import Tensor

from scale.pipeline import Picture
from scale.steps import GaussianSteps, Latents, require_unet
from scale.train.policy import Condition, State


@runtime_checkable
class Chain(Protocol):
    """Steps `k = 0 .. steps - 1` from noise to data, `x_next = mean + std * noise`."""

    @property
    def steps(self) -> int: ...

    def encode(self, prompts: Sequence[str]) -> Condition:
        """What the denoiser is told of each prompt."""
        ...

    def draw(self, generators: Sequence[torch.Generator]) -> State:
        """Standard normal states, each row from its own generator: where generation starts, and a step's noise."""
        ...

    def step(self, x: State, k: Int64[Tensor, " n"], condition: Condition) -> tuple[State, Tensor, State]:
        """Mean, standard deviation (n, 1, ...) and the guess of the data `E[x_0 | x]`; gradients pass."""
        ...

    def decode(self, data: State) -> Tensor:
        """Data as the images that a reward sees; gradients pass."""
        ...


@runtime_checkable
class Reward(Protocol):
    """Anything that scores images of prompts, as a `Scorer` does."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...


class PipelineChain(GaussianSteps):
    """The steps that the pipeline's ordinary call takes, with the noise that `scale.pipeline.draw` gives it.

    Raises:
        ValueError: a pipeline without a UNet, another scheduler than DDIM, one that clips, a model that is offloaded,
            or settings out of range.
    """

    def __init__(self, pipe: DiffusionPipeline, steps: int, guidance: float, eta: float) -> None:
        require_unet(pipe)
        own: Any = pipe.scheduler  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(own, DDIMScheduler):
            raise ValueError(
                f"the baselines steer DDIM's Gaussian steps, but the pipeline's scheduler is {type(own).__name__}; "
                'call scale.pipeline.set_scheduler(pipe, "ddim")'
            )
        if any(hasattr(part, "_hf_hook") for part in pipe.components.values()):
            raise ValueError("the baselines need the whole model where it runs; open the pipeline without offload")
        require_count("steps", steps)
        if not isfinite(guidance) or not 0 <= eta <= 1:
            raise ValueError(f"guidance must be finite and eta in [0, 1], received {guidance} and {eta}")
        scheduler = copy.deepcopy(own)
        scheduler.set_timesteps(steps)
        levels = scheduler.alphas_cumprod
        if int(scheduler.timesteps.max()) >= len(levels) or not bool(levels[scheduler.timesteps].min() > 0):
            raise ValueError(
                f"{steps} steps of this scheduler begin where no signal is left; use fewer steps, "
                "and no rescale_betas_zero_snr"
            )
        # as pipelines do: below 1 there is no guidance
        super().__init__(pipe, scheduler, max(1.0, float(guidance)), eta=eta)

    def draw(self, generators: Sequence[torch.Generator]) -> Latents:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Noise in the pipeline's own precision: half-precision draws are other numbers."""
        return super().draw(generators, self.pipe.unet.dtype)


@contextmanager
def steered(pipe: Any) -> Iterator[None]:
    """Within it parameters take no gradient, which would cost memory, and a float16 autoencoder runs in float32.

    Stable Diffusion's autoencoders overflow in float16, and gradients through them vanish.
    """
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    trainable = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    half = pipe.vae.dtype == torch.float16
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        if half:
            pipe.vae.to(torch.float32)
        yield
    finally:
        if half:
            pipe.vae.to(torch.float16)
        for parameter in trainable:
            parameter.requires_grad_(True)


def streams(seed: int, count: int) -> list[torch.Generator]:
    """CPU generators of one picture: seeded as `scale.pipeline.draw` does, and, from the second on, by a hash of it."""
    hashed = [hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=7).digest() for i in range(1, count)]
    seeds = [seed, *(int.from_bytes(digest, "big") for digest in hashed)]
    return [torch.Generator().manual_seed(number) for number in seeds]


def require_count(name: str, value: Any) -> None:
    """ValueError unless it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, received {value!r}")


def require_pictures(pictures: Sequence[Picture], rewards: Sequence[Any]) -> None:
    """ValueError where there is no picture, or a reward does not know a prompt."""
    if not pictures:
        raise ValueError("there is no picture to make; give at least one")
    for reward in rewards:
        if unknown := [picture.prompt for picture in pictures if not reward.knows(picture.prompt)]:
            raise ValueError(f"the reward {reward.name} cannot score the prompt {unknown[0]!r}; use another reward")


def on_the_cpu(images: Tensor) -> Tensor:
    """Images (n, 3, H, W) in float32 on the CPU; ValueError where they are not finite."""
    if not bool(images.isfinite().all()):
        raise ValueError("the model's images are not finite; lower guidance, and prefer bfloat16 or float32 to float16")
    return images.float().cpu()
