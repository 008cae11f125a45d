"""What every scorer offers, and what every scorer's answer is checked for."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import inf, isfinite
from numbers import Real
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "n 3 height width"]
Scores = Float[Tensor, " n"]
Number = float | int


class Scorer(ABC):
    """A reward of images, higher for better ones: `score` asks `_score` for a batch at a time and checks the answer.

    `range` bounds the score (infinite where nothing does), `differentiable` says whether gradients reach the pixels,
    and `batch_size` is how many images it looks at together. `a + b`, `0.3 * a` and `a - 19` are scorers too.
    """

    name: str
    range: tuple[float, float] = (-inf, inf)
    differentiable: bool = False
    batch_size: int = 64
    files: Sequence[Path | str] = ()
    """What it was loaded from: files, or an address where a library keeps them; equal files give equal scores."""
    runs_on: ClassVar[str] = "accelerator"
    """"accelerator": images are moved to the GPU where there is one; "anywhere": they are scored where they are."""

    @abstractmethod
    def _score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores (n,) of at most `batch_size` images (n, 3, H, W) float32 in [0, 1]."""

    def score(self, images: Images, prompts: Sequence[str]) -> Scores:
        """Images (n, 3, H, W) in [0, 1] and their prompts -> scores (n,) float32, on the images' device.

        Raises:
            ValueError: images that are none, another number of prompts, or a scorer whose answer is not one finite
                number an image; the message names the scorer.
        """
        check_images(images, prompts)
        if self.batch_size < 1:
            raise ValueError(f"the batch_size of the reward {self.name} must be at least 1, received {self.batch_size}")
        where = device() if self.runs_on == "accelerator" else images.device
        scores = [images.new_zeros(0, dtype=torch.float32)]
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            answer = self._score(images[rows].to(where, torch.float32), prompts[rows])
            scores.append(self._checked(answer, prompts[rows]).to(images.device))
        return torch.cat(scores)

    def knows(self, prompt: str) -> bool:
        """Whether it can score images of this prompt: most can score any."""
        return True

    def _checked(self, scores: Tensor, prompts: Sequence[str]) -> Tensor:
        if scores.shape != (len(prompts),):
            raise ValueError(
                f"the reward {self.name} must give one number an image, "
                f"received shape {tuple(scores.shape)} for {len(prompts)} images"
            )
        scores = scores.float()
        if bad := (~scores.isfinite()).nonzero().flatten().tolist():
            raise ValueError(
                f"the reward {self.name} gave NaN or infinity to {len(bad)} of {len(prompts)} images, "
                f"the first of the prompt {prompts[bad[0]]!r}"
            )
        return scores

    def __mul__(self, factor: Number) -> "Scorer":
        return Mix(((factor, self),)) if isinstance(factor, Real) else NotImplemented

    __rmul__ = __mul__

    def __add__(self, other: "Scorer | Number") -> "Scorer":
        if isinstance(other, Scorer):
            return Mix(((1.0, self), (1.0, other)))
        return Mix(((1.0, self),), other) if isinstance(other, Real) else NotImplemented

    __radd__ = __add__

    def __neg__(self) -> "Scorer":
        return -1.0 * self

    def __sub__(self, other: "Scorer | Number") -> "Scorer":
        return self + -1.0 * other

    def __rsub__(self, other: Number) -> "Scorer":
        return -self + other


class Mix(Scorer):
    """`sum_i w_i r_i + shift`: what `0.3 * a + 0.7 * b` makes. Every term scores in batches of its own size.

    Raises:
        ValueError: no term; a weight or a shift that is NaN or infinite.
    """

    runs_on = "anywhere"
    batch_size = sys.maxsize

    def __init__(self, terms: Sequence[tuple[Number, Scorer]], shift: Number = 0.0) -> None:
        flat = [(float(w * v), scorer) for w, term in terms for v, scorer in _terms(term)]
        self.shift = float(shift + sum(w * _shift(term) for w, term in terms))
        self.terms = tuple(flat)
        numbers = [w for w, _ in flat] + [self.shift]
        if not flat or not all(isfinite(number) for number in numbers):
            raise ValueError(f"a mix of rewards needs a term, and finite weights and shift; received {numbers}")
        self.name = _expression(flat, self.shift)
        self.differentiable = all(s.differentiable for _, s in flat)
        self.files = tuple(dict.fromkeys(file for _, scorer in flat for file in scorer.files))
        # a zero weight times an infinite bound is no bound's business
        ends = [sorted((w * s.range[0], w * s.range[1])) if w else (0.0, 0.0) for w, s in flat]
        self.range = (self.shift + sum(low for low, _ in ends), self.shift + sum(high for _, high in ends))

    def _score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        total = images.new_zeros(len(images))
        for weight, scorer in self.terms:
            total = total + weight * scorer.score(images, prompts)
        return total + self.shift

    def knows(self, prompt: str) -> bool:
        """Whether every term can score images of this prompt."""
        return all(scorer.knows(prompt) for _, scorer in self.terms)


def _terms(scorer: Scorer) -> tuple[tuple[float, Scorer], ...]:
    return scorer.terms if isinstance(scorer, Mix) else ((1.0, scorer),)


def _shift(scorer: Scorer) -> float:
    return scorer.shift if isinstance(scorer, Mix) else 0.0


def _expression(terms: Sequence[tuple[float, Scorer]], shift: float) -> str:
    """`0.2*a - b + 3`: what `parse_reward` reads."""
    pieces = [(w, scorer.name if abs(w) == 1 else f"{abs(w):.12g}*{scorer.name}") for w, scorer in terms]
    pieces += [(shift, f"{abs(shift):.12g}")] if shift else []
    text = " ".join(f"{'-' if number < 0 else '+'} {piece}" for number, piece in pieces)
    return text[2:] if text.startswith("+") else "-" + text[2:]


def device() -> torch.device:
    """Where scorers with weights run: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_images(images: Tensor, prompts: Sequence[str]) -> None:
    """ValueError unless images are (n, 3, H, W), at least a pixel each, in [0, 1], with one prompt each."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:] or len(images) != len(prompts):
        raise ValueError(
            "a scorer takes images (n, 3, height, width) and n prompts, "
            f"received {tuple(images.shape)} and {len(prompts)}"
        )
    if not images.is_floating_point():
        raise ValueError(f"images must be floating-point numbers in [0, 1], received {images.dtype}; divide by 255")
    low, high = torch.aminmax(images.detach()) if len(images) else (torch.zeros(()), torch.ones(()))
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also catches NaN
        raise ValueError(f"images must lie in [0, 1], received values from {low:.3g} to {high:.3g}")
