"""A diffusion pipeline as a policy: DDIM's Gaussian steps, their means, and the log-probabilities of their samples."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from jaxtyping import Float, Int64
from torch import Tensor

Latents = Float[Tensor, "n channels height width"]


@dataclass(frozen=True)
class Rollout:
    """Trajectories from noise to data: `latents[k]` at `timesteps[k]`, one more at the end, and its images.

    `log_probabilities[k]` are those of the steps from `latents[k]` to `latents[k + 1]` under the policy that made them.
    """

    prompts: list[str]
    text: Float[Tensor, "two n tokens features"]
    timesteps: Int64[Tensor, " steps"]
    latents: Float[Tensor, "steps+1 n channels height width"]
    log_probabilities: Float[Tensor, "steps n"]
    images: Float[Tensor, "n 3 h w"]


class Policy:
    """The denoiser of a Stable Diffusion pipeline under classifier-free guidance, stepped by DDIM with eta = 1.

    `guidance` follows diffusers: `uncond + guidance (cond - uncond)`, 1 means none. `bf16` runs the denoiser under
    autocast.
    """

    def __init__(self, pipe: StableDiffusionPipeline, steps: int, guidance: float, bf16: bool = False) -> None:
        self.pipe, self.guidance, self.bf16 = pipe, guidance, bf16
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        assert isinstance(scheduler, DDIMScheduler)
        scheduler.set_timesteps(steps, device=pipe.unet.device)
        self.scheduler = scheduler
        self.timesteps: Tensor = scheduler.timesteps

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Float[Tensor, "two n tokens features"]:
        """Text states of the empty prompt (row 0) and of each prompt (row 1)."""
        tokens = self.pipe.tokenizer(
            ["", *prompts], padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        states = self.pipe.text_encoder(tokens.to(self.pipe.text_encoder.device)).last_hidden_state
        return torch.stack((states[:1].expand(len(prompts), -1, -1), states[1:]))

    def noise(self, x: Latents, t: Int64[Tensor, " n"], text: Float[Tensor, "two n tokens features"]) -> Latents:
        """Guided noise prediction at timesteps `t`, one a sample."""
        if self.guidance == 1:
            return self._denoise(x, t, text[1])
        unconditional, conditional = self._denoise(torch.cat((x, x)), torch.cat((t, t)), text.flatten(0, 1)).chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    def _denoise(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.pipe.unet(x, t, states, return_dict=False)[0].float()

    def moments(self, x: Latents, t: Int64[Tensor, " n"], eps: Latents) -> tuple[Latents, Tensor]:
        """Mean and standard deviation (n, 1, 1, 1) of DDIM's step at eta = 1 (Song et al. 2021, eq. 12 and 16)."""
        stride = self.scheduler.config["num_train_timesteps"] // len(self.timesteps)
        cumulative = self.scheduler.alphas_cumprod.to(x)
        before = torch.where(
            t >= stride, cumulative[(t - stride).clamp(min=0)], self.scheduler.final_alpha_cumprod.to(x)
        )
        now, before = (a.view(-1, 1, 1, 1) for a in (cumulative[t], before))
        variance = (1 - before) / (1 - now) * (1 - now / before)
        clean = (x - (1 - now).sqrt() * eps) / now.sqrt()
        return before.sqrt() * clean + (1 - before - variance).clamp(min=0).sqrt() * eps, variance.sqrt()

    @torch.no_grad()
    def rollout(self, prompts: Sequence[str], generator: torch.Generator) -> Rollout:
        """One trajectory a prompt, noise from `generator`."""
        device, text = self.pipe.unet.device, self.encode(prompts)
        config = self.pipe.unet.config
        shape = (len(prompts), config.in_channels, config.sample_size, config.sample_size)
        latents, log_probabilities = [torch.randn(shape, generator=generator).to(device)], []
        for t in self.timesteps:
            at = t.expand(len(prompts))
            mean, std = self.moments(latents[-1], at, self.noise(latents[-1], at, text))
            latents.append(mean + std * torch.randn(shape, generator=generator).to(device))
            log_probabilities.append(log_probability(latents[-1], mean, std))
        vae = self.pipe.vae
        decoded = vae.decode(latents[-1] / vae.config.scaling_factor, return_dict=False)[0]
        images = (decoded / 2 + 0.5).clamp(0, 1)
        stacked = torch.stack(latents), torch.stack(log_probabilities)
        return Rollout(list(prompts), text, self.timesteps, *stacked, images)


def log_probability(x_next: Latents, mean: Latents, std: Tensor) -> Float[Tensor, " n"]:
    """Log-density of a Gaussian step per dimension (their mean, as in DPOK's code), constants dropped."""
    return -((x_next - mean) / std).square().flatten(1).mean(1) / 2 - std.flatten(1).log().squeeze(1)


def kl_divergence(mean: Latents, base_mean: Latents, std: Tensor) -> Float[Tensor, " n"]:
    """KL of a step from the base model's step of the same variance, per dimension."""
    return ((mean - base_mean) / std).square().flatten(1).mean(1) / 2
