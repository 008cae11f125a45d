"""A diffusion pipeline as a policy: DDIM's Gaussian steps at eta = 1, whose denoiser wears one trainable adapter."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.training_utils import cast_training_params
from jaxtyping import Float, Int64
from peft import LoraConfig
from torch import Tensor

from scale.steps import GaussianSteps, Latents, require_gaussian, require_unet
from scale.train.policy import Condition, Rollout, log_probability

ADAPTER = "expert"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2")


class DenoiserPolicy(GaussianSteps):
    """The denoiser of a Stable Diffusion pipeline (1, 2 or XL) under classifier-free guidance, stepped by DDIM.

    `guidance`, `autocast` and `size` are those of `GaussianSteps`. Every step has noise.

    Raises:
        ValueError: a pipeline without a UNet, or a scheduler whose DDIM steps are no Gaussian densities.
    """

    def __init__(
        self, pipe: DiffusionPipeline, steps: int, guidance: float = 1.0, *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext, size: int | None = None,
    ) -> None:  # fmt: skip
        require_unet(pipe)
        super().__init__(pipe, _ddim(pipe.scheduler, steps), guidance, autocast=autocast, size=size)
        self.pipe.vae.to(memory_format=torch.channels_last)  # decodes in half the time on a CPU

    def add_adapter(self, rank: int, targets: Sequence[str], seed: int = 0) -> None:
        """A fresh LoRA adapter in float32 on the denoiser; all else is frozen."""
        for part in self.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):  # peft draws A from the global generator
            torch.manual_seed(seed)
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
            self.pipe.unet.add_adapter(config, adapter_name=ADAPTER)
        cast_training_params(self.pipe.unet)

    def trainable(self) -> Mapping[str, torch.nn.Parameter]:
        return {name: p for name, p in self.pipe.unet.named_parameters() if p.requires_grad}

    @contextmanager
    def base(self) -> Iterator[None]:
        self.pipe.unet.disable_adapters()
        try:
            yield
        finally:
            self.pipe.unet.enable_adapters()

    def features(self, condition: Condition) -> Float[Tensor, "n width"]:
        """The mean of the text's states."""
        return condition["states"].float().mean(1)

    def moments(self, x: Latents, k: Int64[Tensor, " n"], condition: Condition) -> tuple[Latents, Tensor]:
        """Mean and standard deviation (n, 1, 1, 1) of DDIM's step at eta = 1."""
        return self.step(x, k, condition)[:2]

    @torch.no_grad()
    def rollout(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> Rollout:
        """One trajectory a prompt; the noise of a row comes from its own CPU generator, at its turn."""
        condition = self.encode(prompts)
        states, guesses, log_probabilities = [self.draw(generators)], [], []
        for step in range(self.steps):
            k = torch.full((len(prompts),), step, device=self.device)
            mean, std, guess = self.step(states[-1], k, condition)
            states.append(mean + std * self.draw(generators))
            guesses.append(guess)
            log_probabilities.append(log_probability(states[-1], mean, std))
        images = self.decode(states[-1])
        stacked = torch.stack(states), torch.stack(guesses), torch.stack(log_probabilities)
        return Rollout(list(prompts), condition, *stacked, images)

    @torch.no_grad()
    def decode(self, data: Latents) -> Float[Tensor, "n 3 h w"]:
        """Latents as images in [0, 1], without gradients."""
        return super().decode(data)


def _ddim(scheduler: Any, steps: int) -> DDIMScheduler:
    """DDIM on the pipeline's own noise schedule, every step of which has noise."""
    # the last step goes from time 1 to time 0: with alpha = 1 after it, or from time 0 on, it has no density
    config = {"clip_sample": False, **scheduler.config}  # a scheduler that does not know of clipping does not clip
    ddim = DDIMScheduler.from_config(
        config, set_alpha_to_one=False, timestep_spacing="leading", steps_offset=1
    )  # fmt: skip
    assert isinstance(ddim, DDIMScheduler)
    require_gaussian(ddim)
    train_steps = ddim.config["num_train_timesteps"]
    if not 0 < steps < train_steps:
        raise ValueError(f"steps must lie between 1 and {train_steps - 1}, received {steps}")
    ddim.set_timesteps(steps)
    return ddim
