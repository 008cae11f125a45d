"""A Stable Diffusion pipeline as Gaussian steps from noise to data: its denoiser under guidance, stepped by DDIM."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from jaxtyping import Float, Int64
from torch import Tensor

from scale.train.policy import Condition

DECODED = 2**21  # pixels at a time: 8 images of 512 x 512; more would need tens of gigabytes
Latents = Float[Tensor, "n channels height width"]


class GaussianSteps:
    """The denoiser of a Stable Diffusion pipeline (1, 2 or XL) under classifier-free guidance; step k is Gaussian.

    `scheduler` has its timesteps set. `guidance` follows diffusers: `uncond + guidance (cond - uncond)`, 1 means none;
    `eta` scales DDIM's noise. `autocast()` is entered around every run of the denoiser; `size` is the images' height
    and width in pixels, the model's own where None.

    Raises:
        ValueError: a pipeline without a UNet, a size that the autoencoder cannot make, or a scheduler whose steps are
            not Gaussian.
    """

    def __init__(
        self, pipe: DiffusionPipeline, scheduler: DDIMScheduler, guidance: float = 1.0, *, eta: float = 1.0,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext, size: int | None = None,
    ) -> None:  # fmt: skip
        require_unet(pipe)
        require_gaussian(scheduler)
        self.pipe: Any = pipe
        self.scheduler, self.guidance, self.eta = scheduler, guidance, eta
        self.autocast, self.size = autocast, size
        if size is not None and size % self._pixels():
            raise ValueError(f"size must be a multiple of {self._pixels()} pixels, received {size}")
        self.timesteps: Tensor = scheduler.timesteps.to(self.device)
        cumulative = scheduler.alphas_cumprod.to(self.device, torch.float32)
        apart = scheduler.config["num_train_timesteps"] // scheduler.num_inference_steps
        before = self.timesteps - apart
        last = scheduler.final_alpha_cumprod.to(cumulative)
        self.alphas = cumulative[self.timesteps]
        self.next_alphas = torch.where(before >= 0, cumulative[before.clamp(min=0)], last)

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def device(self) -> torch.device:
        return self.pipe.unet.device

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

    def step(self, x: Latents, k: Int64[Tensor, " n"], condition: Condition) -> tuple[Latents, Tensor, Latents]:
        """DDIM's step: mean, standard deviation (n, 1, 1, 1), and the data that the denoiser expects, `E[x_0 | x]`.

        Song et al. (2021), eq. 12 and 16. The last step's deviation may be zero.
        """
        eps = self.noise(x, k, condition)
        now, after = (alphas[k].view(-1, 1, 1, 1) for alphas in (self.alphas, self.next_alphas))
        std = self.eta * ((1 - after) / (1 - now) * (1 - now / after)).sqrt()
        clean = (x - (1 - now).sqrt() * eps) / now.sqrt()
        mean = after.sqrt() * clean + (1 - after - std**2).clamp(min=0).sqrt() * eps
        return mean, std, clean

    def draw(self, generators: Sequence[torch.Generator], dtype: torch.dtype = torch.float32) -> Latents:
        """Standard normal latents, each row drawn in `dtype` from its own CPU generator, in float32."""
        rows = [torch.randn(self._shape(), generator=generator, dtype=dtype) for generator in generators]
        return torch.stack(rows).to(self.device, torch.float32)

    def decode(self, data: Latents) -> Float[Tensor, "n 3 h w"]:
        """Latents as images in [0, 1]; gradients pass."""
        vae = self.pipe.vae
        at_once = max(1, DECODED // (data[0, 0].numel() * self._pixels() ** 2)) if len(data) else 1
        latents = (data.to(vae.dtype) / vae.config.scaling_factor).split(at_once)
        decoded = torch.cat([vae.decode(part, return_dict=False)[0].float() for part in latents])
        return (decoded / 2 + 0.5).clamp(0, 1)


def require_unet(pipe: DiffusionPipeline) -> None:
    """ValueError for a pipeline that has none."""
    if not hasattr(pipe, "unet"):
        raise ValueError(f"this needs a pipeline with a UNet (Stable Diffusion 1, 2, XL), not {type(pipe).__name__}")


def require_gaussian(scheduler: DDIMScheduler) -> None:
    """ValueError for a scheduler that changes its guess of the data, or whose prediction is not noise or v."""
    config, prediction = scheduler.config, scheduler.config["prediction_type"]
    if config["clip_sample"] or config["thresholding"] or prediction not in ("epsilon", "v_prediction"):
        raise ValueError(
            "Gaussian steps need a scheduler that neither clips nor thresholds, of epsilon or v_prediction; received "
            f"clip_sample {config['clip_sample']}, thresholding {config['thresholding']}, {prediction}"
        )
