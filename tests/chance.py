"""Statistical tests at one stated false-alarm level, shared by the tests of a family."""

from collections.abc import Sequence

import numpy as np
from scipy import stats
from torch import Tensor

FALSE_ALARM = 1e-5


def law_p_value(draws: Tensor, probabilities: Sequence[float]) -> float:
    """Pearson's chi-square p-value of integer draws under a categorical law."""
    counts = np.bincount(draws.numpy(), minlength=len(probabilities))
    return float(stats.chisquare(counts, len(draws) * np.asarray(probabilities)).pvalue)


def mean_p_value(values: Tensor, mean: float) -> float:
    """Two-sided p-value of a sample's mean, by the central limit theorem."""
    z = (float(values.mean()) - mean) / (float(values.std()) / len(values) ** 0.5)
    return float(2 * stats.norm.sf(abs(z)))


def alarms(p_values: Sequence[float]) -> bool:
    """True where the smallest p-value contradicts the hypothesis, corrected for multiplicity (Bonferroni)."""
    return min(p_values) < FALSE_ALARM / len(p_values)
