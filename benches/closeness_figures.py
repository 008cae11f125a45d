"""Means and standard errors over prompts: images of one prompt are no independent evidence."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Values = Float[Tensor, "prompts seeds"]


class Figure(NamedTuple):
    """A mean and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} +- {self.error:.3f}"


def figure(values: Values) -> Figure:
    """The mean over prompts of their means over seeds, and its standard error."""
    prompts = values.to(torch.float64).mean(1)
    return Figure(float(prompts.mean()), float(prompts.std() / math.sqrt(len(prompts))))


def ratio(numerator: Values, denominator: Values) -> Figure:
    """The ratio of two means, and its standard error to first order; the prompts are the same ones."""
    above, below = (values.to(torch.float64).mean(1) for values in (numerator, denominator))
    value = above.mean() / below.mean()
    return Figure(float(value), figure(((above - value * below) / below.mean()).unsqueeze(1)).error)


def rms_distance(latents: Float[Tensor, "n c h w"], others: Float[Tensor, "n c h w"], seeds: int) -> Values:
    """The root mean square difference of each image's latents; rows run over the seeds of each prompt in turn."""
    squares = (latents - others).to(torch.float64).flatten(1).square()
    return squares.mean(1).sqrt().unflatten(0, (-1, seeds))


def order(distances: tuple[float, float], scales: tuple[float, float]) -> float:
    """The power of the scale with which a distance falls between two scales."""
    return math.log(distances[0] / distances[1]) / math.log(scales[0] / scales[1])
