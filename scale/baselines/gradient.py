"""Reward gradient guidance (RGG): each step's mean moves along the gradient of the reward of the guessed image."""

from collections.abc import Sequence
from math import isfinite

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from scale.baselines.chain import (
    Chain,
    PipelineChain,
    Reward,
    on_the_cpu,
    require_count,
    require_pictures,
    steered,
    streams,
)
from scale.baselines.ledger import Ledger
from scale.pipeline import Picture
from scale.rewards import Scorer
from scale.rewards.protocol import Mix
from scale.train.policy import Condition

SCHEDULES = ("printed", "das")
Weighted = Sequence[tuple[float, Scorer]]


def rgg(
    pipe: DiffusionPipeline, pictures: Sequence[Picture], reward: Scorer | Weighted, *, alpha: float, steps: int,
    guidance: float, eta: float = 1.0, gamma: float = 0.024, normalise: bool = True, schedule: str = "printed",
    max_rows: int = 4, ledger: Ledger | None = None,
) -> Float[Tensor, "n 3 height width"]:  # fmt: skip
    """Pictures by reward gradient guidance (paper section B.1, eq. 12-14): images in [0, 1] on the CPU.

    A step's mean becomes `mean + lambda_k std^2/alpha g`, where `g` is the gradient by `x_t` of the reward of the
    decoded guess `E[x_0 | x_t]`, through denoiser, guidance and autoencoder. With several rewards, the terms of a `Mix`
    or pairs (weight, reward), `g` is the weighted sum of their gradients (eq. 13), each first divided by its norm over
    the whole latent where `normalise` (eq. 14). In a `Mix` every scorer is a term: pass pairs where a reward is itself
    a rescaled or mixed one, so that its own scale does not count. alpha = inf is the pipeline's ordinary image.

    `lambda_k` is that of `strength`. An image takes `steps` evaluations (twice that under guidance), and as many
    passes back through the denoiser, once a reward where `normalise`. `max_rows` bounds the images whose graph is in
    memory. Where a `ledger` is given, images scored and rows sent back are added to its `reward_calls` and `gradients`.

    Raises:
        ValueError: a reward without gradients, named; a pipeline without a UNet or with another scheduler than DDIM;
            `eta` = 0, whose steps have no variance; settings out of range; no picture; gradients that are not finite.
    """
    require_count("max_rows", max_rows)
    if not alpha > 0 or not (isfinite(gamma) and gamma > -1) or schedule not in SCHEDULES:
        raise ValueError(
            f"alpha must be positive, gamma finite and above -1 and schedule one of {SCHEDULES}; "
            f"received {alpha}, {gamma}, {schedule!r}"
        )
    rewards = _weighted(reward)
    require_pictures(pictures, [scorer for _, scorer in rewards])
    chain = PipelineChain(pipe, steps, guidance, eta)
    require_variance(eta)
    scales = [strength(k, gamma, schedule) / alpha for k in range(steps)]
    with steered(pipe):
        prompts, seeds = [picture.prompt for picture in pictures], [picture.seed for picture in pictures]
        images = guide(
            chain, prompts, seeds, rewards, scales=scales, normalise=normalise, max_rows=max_rows, ledger=ledger
        )
        return on_the_cpu(images)


def require_variance(eta: float) -> None:
    """ValueError for steps without the variance that scales the guidance."""
    if eta == 0:
        raise ValueError("with eta = 0 a step has no variance, which scales the guidance; use eta > 0")


def strength(k: int, gamma: float, schedule: str = "printed") -> float:
    """`lambda` of step k = 0, 1, ... from noise to data; it grows towards the data, as in Kim et al. (2025).

    The paper's `lambda_{t-1}` is that of the state which the step reaches, and there `lambda_t = (1 + gamma)^(t - 1)`
    where t counts the steps of generation, as in Kim et al.'s code: step k reaches state k + 1, so `(1 + gamma)^k`
    ("printed"). What Kim et al. run is `min((1 + gamma)^t - 1, 1)`, of which the printed formula seems a slip: from
    nearly 0 to at most 1 ("das").
    """
    return (1 + gamma) ** k if schedule == "printed" else min((1 + gamma) ** (k + 1) - 1, 1.0)


def guide(
    chain: Chain, prompts: Sequence[str], seeds: Sequence[int], rewards: Sequence[tuple[float, Reward]], *,
    scales: Sequence[float], normalise: bool, max_rows: int, ledger: Ledger | None = None,
) -> Tensor:  # fmt: skip
    """RGG on any chain of Gaussian steps, `scales[k] = lambda_k/alpha`: one image a prompt."""
    images, ledger = [], ledger or Ledger()
    for start in range(0, len(prompts), max_rows):
        rows = slice(start, start + max_rows)
        with torch.no_grad():
            condition = chain.encode(prompts[rows])
        generators = [streams(seed, 1)[0] for seed in seeds[rows]]
        x = chain.draw(generators)
        for k, scale in enumerate(scales):
            mean, std, g = _gradient(chain, x, k, condition, prompts[rows], rewards, normalise, ledger)
            x = mean + scale * std**2 * g + std * chain.draw(generators)
        with torch.no_grad():
            images.append(chain.decode(x))
    return torch.cat(images)


def _gradient(
    chain: Chain, x: Tensor, k: int, condition: Condition, prompts: Sequence[str],
    rewards: Sequence[tuple[float, Reward]], normalise: bool, ledger: Ledger,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Mean and deviation of step k, and the rewards' gradient by x: all detached."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        mean, std, clean = chain.step(x, torch.full((len(x),), k, device=x.device), condition)
        if not bool(std.any()):  # the last step of some schedules: what is scaled by nothing need not be known
            return mean.detach(), std.detach(), torch.zeros_like(x)
        images = chain.decode(clean)
    ledger.reward_calls += len(x)
    # one reward's graph at a time: to the pixels first, from there through the one graph of autoencoder and denoiser
    pixels = [weight * _by_pixels(reward, images, prompts) for weight, reward in rewards]
    pulled = pixels if normalise else [sum(pixels[1:], pixels[0])]
    weights = [weight for weight, _ in rewards]
    g = torch.zeros_like(x)
    for i, pixel in enumerate(pulled):
        ledger.gradients += len(x)
        one = _pull(images, x, pixel, keep=i + 1 < len(pulled))
        g = g + (abs(weights[i]) * _unit(one) if normalise else one)  # the weight's sign is in the gradient
    if not bool(g.isfinite().all()):
        raise ValueError("a reward's gradient is not finite; use bfloat16 or float32, or a smaller step (larger alpha)")
    return mean.detach(), std.detach(), g


def _by_pixels(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        score = reward.score(leaf, prompts).sum()
    return torch.autograd.grad(score, leaf)[0]


def _pull(images: Tensor, x: Tensor, pixels: Tensor, keep: bool) -> Tensor:
    """The gradient by `x` of what has this gradient by the images.

    Each image's goes back at unit norm: a mean over the pixels would vanish in float16.
    """
    norms = _norms(pixels)
    pulled = torch.autograd.grad(images, x, pixels / torch.where(norms > 0, norms, 1), retain_graph=keep)[0]
    return pulled * norms.view(-1, *(1,) * (x.ndim - 1))


def _unit(g: Tensor) -> Tensor:
    norms = _norms(g)
    return g / torch.where(norms > 0, norms, 1)


def _norms(g: Tensor) -> Tensor:
    """Euclidean norm of each row, (n, 1, ...)."""
    return torch.linalg.vector_norm(g.flatten(1), dim=1).view(-1, *(1,) * (g.ndim - 1))


def _weighted(reward: Scorer | Weighted) -> list[tuple[float, Scorer]]:
    """Rewards of weight other than 0; ValueError for none, or one that has no gradient."""
    pairs = reward.terms if isinstance(reward, Mix) else [(1.0, reward)] if isinstance(reward, Scorer) else reward
    used = [(float(weight), scorer) for weight, scorer in pairs if weight != 0]
    if not used or not isfinite(sum((weight for weight, _ in used), 0.0)):
        raise ValueError(f"guidance needs rewards of finite weights that are not all 0, received {pairs}")
    terms = [term for _, scorer in used for term in (scorer.terms if isinstance(scorer, Mix) else [(1.0, scorer)])]
    if flat := [term.name for _, term in terms if not term.differentiable]:
        raise ValueError(
            f"reward gradient guidance needs the gradient of every reward, and {', '.join(flat)} has none; "
            "leave it out, or use CoDe, which needs none"
        )
    return used
