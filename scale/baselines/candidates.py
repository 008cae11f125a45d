"""CoDe: of the candidates that a block of steps makes, the one with the best look-ahead reward goes on."""

from collections.abc import Sequence

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
from scale.train.policy import Condition


def code(
    pipe: DiffusionPipeline, pictures: Sequence[Picture], reward: Scorer, *, steps: int, guidance: float,
    eta: float = 1.0, candidates: int = 20, block: int = 5, max_rows: int = 64, ledger: Ledger | None = None,
) -> Float[Tensor, "n 3 height width"]:  # fmt: skip
    """Pictures by CoDe (Singh et al. 2025; paper section B.1): images in [0, 1] on the CPU.

    Every `block` steps the one of `candidates` continuations goes on whose look-ahead `r(decode(E[x_0 | x_t]))` is
    highest; at the end it is the image itself that is scored. `block >= steps` is best-of-N, since the candidates of
    the first block have initial noise of their own. One candidate is the pipeline's ordinary image: the first candidate
    has its noise, and the others' comes from a hash of the picture's seed, so a picture does not depend on its batch.

    An image takes `candidates * steps` evaluations of the denoiser (twice that under guidance): the look-ahead of a
    block is the first evaluation of the next one. `max_rows` bounds the latents that are denoised at once (guidance
    doubles the rows). Where a `ledger` is given, the images scored are added to its `reward_calls`.

    Raises:
        ValueError: a pipeline without a UNet or with another scheduler than DDIM; counts below 1; `eta` = 0, where the
            candidates of a later block would not differ; no picture; a prompt that the reward does not know.
    """
    counts = {"candidates": candidates, "block": block, "max_rows": max_rows}
    for name, value in counts.items():
        require_count(name, value)
    require_pictures(pictures, [reward])
    chain = PipelineChain(pipe, steps, guidance, eta)
    require_choice(steps, eta, candidates=candidates, block=block)
    with steered(pipe):
        prompts, seeds = [picture.prompt for picture in pictures], [picture.seed for picture in pictures]
        return on_the_cpu(search(chain, prompts, seeds, reward, ledger=ledger, **counts))


def require_choice(steps: int, eta: float, *, candidates: int, block: int) -> None:
    """ValueError where the candidates of a later block would not differ."""
    if eta == 0 and block < steps and candidates > 1:
        raise ValueError("with eta = 0 all candidates of a block are the same; use eta > 0, or block >= steps")


@torch.no_grad()
def search(
    chain: Chain, prompts: Sequence[str], seeds: Sequence[int], reward: Reward, *,
    candidates: int, block: int, max_rows: int, ledger: Ledger | None = None,
) -> Tensor:  # fmt: skip
    """CoDe on any chain of Gaussian steps: one image a prompt."""
    at_once, ledger = max(1, max_rows // candidates), ledger or Ledger()
    images = []
    for start in range(0, len(prompts), at_once):
        rows = slice(start, start + at_once)
        group = _Group(chain, prompts[rows], seeds[rows], reward, candidates, max_rows, ledger)
        images.append(group.search(block))
    return torch.cat(images)


class _Group:
    """Pictures that are made together, `candidates` rows each."""

    def __init__(
        self, chain: Chain, prompts: Sequence[str], seeds: Sequence[int], reward: Reward,
        candidates: int, max_rows: int, ledger: Ledger,
    ) -> None:  # fmt: skip
        self.chain, self.reward, self.ledger = chain, reward, ledger
        self.candidates, self.max_rows = candidates, max_rows
        self.prompts = [prompt for prompt in prompts for _ in range(candidates)]
        self.generators = [generator for seed in seeds for generator in streams(seed, candidates)]
        self.condition: Condition = chain.encode(self.prompts)

    def search(self, block: int) -> Tensor:
        """The images of the last block's winners."""
        x = self.chain.draw(self.generators)
        for k in range(self.chain.steps):
            mean, std, clean = self._step(x, k)
            if k and k % block == 0:
                best = self._best(self._scores(self._images(clean)), self.candidates)
                mean, std = mean[best], std[best]
            x = mean + std * self.chain.draw(self.generators)
        images = self._images(x)
        return images[self._best(self._scores(images), 1)]

    def _step(self, x: Tensor, k: int) -> list[Tensor]:
        """Mean, deviation and guess at step `k`, at most `max_rows` rows at a time."""
        parts = []
        for start in range(0, len(x), self.max_rows):
            rows = slice(start, start + self.max_rows)
            at = torch.full((len(x[rows]),), k, device=x.device)
            told = {name: value[rows] for name, value in self.condition.items()}
            parts.append(self.chain.step(x[rows], at, told))
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    def _images(self, data: Tensor) -> Tensor:
        return torch.cat([self.chain.decode(part) for part in data.split(self.max_rows)])

    def _scores(self, images: Tensor) -> Tensor:
        if self.candidates == 1:  # nothing to choose from
            return images.new_zeros(len(images))
        self.ledger.reward_calls += len(images)
        return self.reward.score(images, self.prompts)

    def _best(self, scores: Tensor, copies: int) -> Tensor:
        """The row of each picture's best candidate (the first of equals), `copies` times."""
        best = scores.view(-1, self.candidates).argmax(1)
        first = torch.arange(len(best), device=best.device) * self.candidates
        return (first + best).repeat_interleave(copies)
