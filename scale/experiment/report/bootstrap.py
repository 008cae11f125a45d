"""Bootstrap intervals that respect what is independent: prompts, not the seeds of one prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isnan

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

DRAWS, LEVEL, SEED = 2000, 0.95, 2026
NAN = float("nan")

Statistic = Callable[[Float[np.ndarray, "draws k"]], Float[np.ndarray, " draws"]]


@dataclass(frozen=True)
class Estimate:
    """A statistic and its 95 % interval; `images` values from `units` independent units ("prompts" or "images")."""

    value: float
    low: float
    high: float
    images: int
    units: int
    unit: str

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]")


def estimate(values: Float[np.ndarray, "n k"], prompts: Sequence[str], statistic: Statistic | None = None) -> Estimate:
    """A function of the means of k columns (the first column's mean if none is given), with a percentile interval.

    The bootstrap resamples prompts, each with all its seeds: seeds of one prompt are not independent. Where there is
    one prompt alone its images are resampled, and the interval speaks of that prompt only. 2000 draws of a seeded
    numpy Generator; two estimates over the same number of units share their draws. NaN without values; one unit alone,
    or a statistic that is NaN in more than a 40th of the draws, has no interval.
    """
    names, index = np.unique(np.asarray(prompts, dtype=str), return_inverse=True)
    unit = "prompts"
    if len(names) == 1:
        index, unit = np.arange(len(values)), "images"
    take = statistic or (lambda means: means[..., 0])
    if not len(values):
        return Estimate(NAN, NAN, NAN, 0, 0, unit)
    counts = np.bincount(index)
    sums = np.stack([np.bincount(index, column) for column in np.asarray(values, dtype=float).T], 1)
    picks = _picks(len(counts))
    with np.errstate(divide="ignore", invalid="ignore"):  # ratios and correlations of some draws are none
        drawn = take(picks @ sums / (picks @ counts)[:, None])
        value = float(take(sums.sum(0, keepdims=True) / counts.sum())[0])
    low, high = _percentiles(drawn) if len(counts) > 1 else (NAN, NAN)
    return Estimate(value, low, high, len(values), len(counts), unit)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; it takes trials as independent."""
    interval = stats.binomtest(successes, trials).proportion_ci(LEVEL, "wilson")
    return float(interval.low), float(interval.high)


def _percentiles(drawn: Float[np.ndarray, " draws"]) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    finite = drawn[np.isfinite(drawn)]
    if len(finite) < (1 - tail) * len(drawn):
        return NAN, NAN
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)


@lru_cache(maxsize=8)
def _picks(units: int) -> Int[np.ndarray, "draws units"]:
    """How often each draw takes each unit."""
    return np.random.default_rng(SEED).multinomial(units, np.full(units, 1 / units), size=DRAWS)
