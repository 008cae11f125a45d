"""Training the base model of the small world: pictures, autoencoder, then text encoder and denoiser together."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor, nn

from dbtheory.files import write_atomically
from scale.mini import components, world
from scale.mini.loop import fit
from scale.progress import progress_bar

PICTURES = 16_384
WRONG_COLOURS = 0.15  # of the captions' colours: the base model is imperfect, as Stable Diffusion is
EMPTY_PROMPTS = 0.1  # for classifier-free guidance


def pictures(
    path: Path, count: int = PICTURES, wrong_colours: float = WRONG_COLOURS, seed: int = 0
) -> tuple[Tensor, list[str]]:
    """Rendered training pictures (count, 3, 64, 64) uint8 and their captions, some colours of which are wrong."""
    if not path.exists():
        rng = np.random.default_rng(seed)
        prompts = world.train_prompts()
        singles = [p for p in prompts if len(world.parse(p)) == 1]
        images, captions = [], []
        with progress_bar() as bar:
            for _ in bar.track(range(count), task_id=bar.add_task("pictures", total=count, note="")):
                prompt = str(rng.choice(singles if rng.random() < 0.3 else prompts))
                images.append(world.render(world.parse(prompt), rng))
                captions.append(world.caption(tuple(_mislabel(t, wrong_colours, rng) for t in world.parse(prompt))))
        write_atomically(path, lambda temporary: np.savez(temporary, images=np.stack(images), captions=captions))
    stored = np.load(path)
    return torch.from_numpy(stored["images"]).permute(0, 3, 1, 2), [str(c) for c in stored["captions"]]


def _mislabel(thing: world.Thing, probability: float, rng: np.random.Generator) -> world.Thing:
    if rng.random() < probability:
        return thing._replace(colour=str(rng.choice(list(world.COLOURS))))
    return thing


def train_autoencoder(images: Tensor, work: Path, steps: int, seed: int = 0) -> AutoencoderKL:
    """Reconstruct pictures under a light KL; the scaling factor makes the latents' standard deviation one."""
    torch.manual_seed(seed)
    vae = components.autoencoder().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def loss_at(module: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (16,), generator=generator)
        target = (images[rows].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        posterior = module.encode(target).latent_dist  # pyright: ignore[reportCallIssue]
        decoded = module.decode(posterior.sample(generator=generator)).sample  # pyright: ignore[reportCallIssue]
        edges = sum(F.l1_loss(decoded.diff(dim=axis), target.diff(dim=axis)) for axis in (2, 3))
        return F.l1_loss(decoded, target) + edges + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    vae = fit("autoencoder", vae, loss_at, steps=steps, learning_rate=3e-3, seed=seed, work=work)
    assert isinstance(vae, AutoencoderKL)
    vae.register_to_config(scaling_factor=1 / float(encode(vae, images[:1024])[0].std()))
    return vae


def polish_decoder(vae: AutoencoderKL, images: Tensor, work: Path, steps: int, seed: int = 0) -> AutoencoderKL:
    """Train the decoder on, at fixed latents, for the colours that the edges' loss neglects."""
    vae.encoder.requires_grad_(False)

    def loss_at(module: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (16,), generator=generator)
        target = (images[rows].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            latents = module.encode(target).latent_dist.sample(generator=generator)  # pyright: ignore[reportCallIssue]
        decoded = module.decode(latents).sample  # pyright: ignore[reportCallIssue]
        return F.l1_loss(decoded, target) + 4 * F.mse_loss(decoded, target)

    vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    polished = fit("decoder", vae, loss_at, steps=steps, learning_rate=1.5e-3, seed=seed, work=work)
    assert isinstance(polished, AutoencoderKL)
    return polished


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n, 4, 16, 16) of the latents of uint8 pictures, unscaled."""
    posteriors = [vae.encode(batch.float() / 127.5 - 1).latent_dist for batch in images.split(64)]  # pyright: ignore
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


def train_denoiser(
    vae: AutoencoderKL, images: Tensor, captions: list[str], work: Path, steps: int, seed: int = 0,
    precision: torch.dtype = torch.bfloat16,
) -> StableDiffusionPipeline:  # fmt: skip
    """Predict the noise of scaled latents given the caption; text encoder and UNet are learnt together.

    `precision` is that of the UNet's arithmetic.
    """
    torch.manual_seed(seed)
    tokens = components.tokenizer()
    parts = nn.ModuleDict({"text": components.text_encoder(tokens), "unet": components.denoiser()})
    mean, std = (vae.config.scaling_factor * part for part in encode(vae, images))  # pyright: ignore
    ids = tokens(["", *captions], padding="max_length", truncation=True, return_tensors="pt").input_ids
    noise_scheduler = components.scheduler()

    def loss_at(module: nn.Module, generator: torch.Generator) -> Tensor:
        assert isinstance(module, nn.ModuleDict)
        rows = torch.randint(len(mean), (64,), generator=generator)
        clean = mean[rows] + std[rows] * torch.randn(mean[rows].shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(1000, (len(rows),), generator=generator)
        kept = torch.rand(len(rows), generator=generator) >= EMPTY_PROMPTS
        text = module["text"](ids[(rows + 1) * kept]).last_hidden_state
        noisy = noise_scheduler.add_noise(clean, noise, t)  # pyright: ignore
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            predicted = module["unet"](noisy, t, text, return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise)

    parts = fit("denoiser", parts, loss_at, steps=steps, learning_rate=1e-3, seed=seed, work=work)
    assert isinstance(parts, nn.ModuleDict)
    return components.pipeline(vae, parts["text"], tokens, parts["unet"])  # pyright: ignore
