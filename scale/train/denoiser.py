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

from scale.train.policy import Condition, Rollout, log_probability

ADAPTER = "expert"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2")
DECODED = 2**21  # pixels at a time: 8 images of 512 x 512; more would need tens of gigabytes
Latents = Float[Tensor, "n channels height width"]


class DenoiserPolicy:
    """The denoiser of a Stable Diffusion pipeline (1, 2 or XL) under classifier-free guidance, stepped by DDIM.

    `guidance` follows diffusers: `uncond + guidance (cond - uncond)`, 1 means none. `autocast()` is entered around
    every run of the denoiser; `size` is the images' height and width in pixels, the model's own where None.

    Raises:
        ValueError: a pipeline without a UNet, or a scheduler whose DDIM steps are no Gaussian densities.
    """

    def __init__(
        self, pipe: DiffusionPipeline, steps: int, guidance: float = 1.0, *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext, size: int | None = None,
    ) -> None:  # fmt: skip
        if not hasattr(pipe, "unet"):
            raise ValueError(
                f"training needs a pipeline with a UNet (Stable Diffusion 1, 2, XL), not {type(pipe).__name__}"
            )
        self.pipe: Any = pipe
        self.pipe.vae.to(memory_format=torch.channels_last)  # decodes in half the time on a CPU
        self.guidance, self.autocast, self.size = guidance, autocast, size
        if size is not None and size % self._pixels():
            raise ValueError(f"size must be a multiple of {self._pixels()} pixels, received {size}")
        self.scheduler = _ddim(self.pipe.scheduler, steps)
        self.timesteps: Tensor = self.scheduler.timesteps.to(self.device)
        cumulative = self.scheduler.alphas_cumprod.to(self.device, torch.float32)
        before = self.timesteps - self.scheduler.config["num_train_timesteps"] // steps
        last = self.scheduler.final_alpha_cumprod.to(cumulative)
        self.alphas = cumulative[self.timesteps]
        self.next_alphas = torch.where(before >= 0, cumulative[before.clamp(min=0)], last)

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def device(self) -> torch.device:
        return self.pipe.unet.device

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

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Text states of each prompt, with those of no prompt beside them where guidance needs them (SDXL's: zeros)."""
        guided = self.guidance != 1
        unique = list(dict.fromkeys(prompts))
        encoded = self.pipe.encode_prompt(
            prompt=unique, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=guided
        )  # fmt: skip
        names = ("states", "empty_states", "pooled", "empty_pooled")
        rows = torch.tensor([unique.index(prompt) for prompt in prompts], device=self.device)
        return {name: value[rows] for name, value in zip(names, encoded, strict=False) if value is not None}

    def features(self, condition: Condition) -> Float[Tensor, "n width"]:
        """The mean of the text's states."""
        return condition["states"].float().mean(1)

    def noise(self, x: Latents, k: Int64[Tensor, " n"], condition: Condition) -> Latents:
        """Guided noise prediction at steps `k`, one a sample."""
        states, pooled = condition["states"], condition.get("pooled")
        if self.guidance == 1:
            return self._denoise(x, k, states, pooled)
        states = torch.cat((condition["empty_states"], states))
        pooled = None if pooled is None else torch.cat((condition["empty_pooled"], pooled))
        empty, full = self._denoise(torch.cat((x, x)), torch.cat((k, k)), states, pooled).chunk(2)
        return empty + self.guidance * (full - empty)

    def _denoise(self, x: Latents, k: Int64[Tensor, " n"], states: Tensor, pooled: Tensor | None) -> Latents:
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": self._time_ids(len(x), pooled.dtype)}
        unet = self.pipe.unet
        with self.autocast():
            out = unet(x.to(unet.dtype), self.timesteps[k], states, added_cond_kwargs=added, return_dict=False)[0]
        out = out.float()
        if self.scheduler.config["prediction_type"] == "epsilon":
            return out
        alpha = self.alphas[k].view(-1, 1, 1, 1)  # v = sqrt(alpha) eps - sqrt(1 - alpha) x_0
        return alpha.sqrt() * out + (1 - alpha).sqrt() * x

    def _time_ids(self, n: int, dtype: torch.dtype) -> Tensor:
        """SDXL's sizes: whole pictures, uncropped."""
        height, width = (side * self._pixels() for side in self._shape()[1:])
        return torch.tensor([[height, width, 0, 0, height, width]], dtype=dtype, device=self.device).expand(n, -1)

    def _pixels(self) -> int:
        """Pixels a side of a latent."""
        return 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    def _shape(self) -> tuple[int, int, int]:
        config = self.pipe.unet.config
        side = config.sample_size if self.size is None else self.size // self._pixels()
        return config.in_channels, side, side

    def moments(self, x: Latents, k: Int64[Tensor, " n"], condition: Condition) -> tuple[Latents, Tensor]:
        """Mean and standard deviation (n, 1, 1, 1) of DDIM's step at eta = 1 (Song et al. 2021, eq. 12 and 16)."""
        return self._step(x, k, self.noise(x, k, condition))[:2]

    def _step(self, x: Latents, k: Int64[Tensor, " n"], eps: Latents) -> tuple[Latents, Tensor, Latents]:
        """Mean, standard deviation and the guess of the data."""
        now, after = (alphas[k].view(-1, 1, 1, 1) for alphas in (self.alphas, self.next_alphas))
        variance = (1 - after) / (1 - now) * (1 - now / after)
        clean = (x - (1 - now).sqrt() * eps) / now.sqrt()
        mean = after.sqrt() * clean + (1 - after - variance).clamp(min=0).sqrt() * eps
        return mean, variance.sqrt(), clean

    @torch.no_grad()
    def rollout(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> Rollout:
        """One trajectory a prompt; the noise of a row comes from its own CPU generator, at its turn."""
        condition, shape = self.encode(prompts), self._shape()

        def noise() -> Tensor:
            return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)

        states, guesses, log_probabilities = [noise()], [], []
        for step in range(self.steps):
            k = torch.full((len(prompts),), step, device=self.device)
            mean, std, guess = self._step(states[-1], k, self.noise(states[-1], k, condition))
            states.append(mean + std * noise())
            guesses.append(guess)
            log_probabilities.append(log_probability(states[-1], mean, std))
        images = self.decode(states[-1])
        stacked = torch.stack(states), torch.stack(guesses), torch.stack(log_probabilities)
        return Rollout(list(prompts), condition, *stacked, images)

    @torch.no_grad()
    def decode(self, data: Latents) -> Float[Tensor, "n 3 h w"]:
        """Latents as images in [0, 1]."""
        vae = self.pipe.vae
        at_once = max(1, DECODED // (data[0, 0].numel() * self._pixels() ** 2)) if len(data) else 1
        latents = (data.to(vae.dtype) / vae.config.scaling_factor).split(at_once)
        decoded = torch.cat([vae.decode(part, return_dict=False)[0].float() for part in latents])
        return (decoded / 2 + 0.5).clamp(0, 1)


def _ddim(scheduler: Any, steps: int) -> DDIMScheduler:
    """DDIM on the pipeline's own noise schedule, every step of which has noise."""
    # the last step goes from time 1 to time 0: with alpha = 1 after it, or from time 0 on, it has no density
    config = {"clip_sample": False, **scheduler.config}  # a scheduler that does not know of clipping does not clip
    ddim = DDIMScheduler.from_config(
        config, set_alpha_to_one=False, timestep_spacing="leading", steps_offset=1
    )  # fmt: skip
    assert isinstance(ddim, DDIMScheduler)
    prediction, train_steps = ddim.config["prediction_type"], ddim.config["num_train_timesteps"]
    if ddim.config["clip_sample"] or ddim.config["thresholding"] or prediction not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"training needs a scheduler that neither clips nor thresholds, of epsilon or v_prediction; received "
            f"clip_sample {ddim.config['clip_sample']}, thresholding {ddim.config['thresholding']}, {prediction}"
        )
    if not 0 < steps < train_steps:
        raise ValueError(f"steps must lie between 1 and {train_steps - 1}, received {steps}")
    ddim.set_timesteps(steps)
    return ddim
