"""Bootstrap intervals hold what they claim where the truth is known, over prompts and not over their seeds."""

import numpy as np
import pytest
from scipy import stats

from scale.experiment.report.bootstrap import DRAWS, estimate, wilson
from scale.experiment.report.claims import UNDECIDED, verdict
from tests.chance import FALSE_ALARM

RUNS, PROMPTS, SEEDS = 300, 60, 4
PERCENTILE_COVERS = 0.93  # of a percentile interval's 95 %, at 60 units


def misses(resampled: np.ndarray) -> int:
    """How many intervals of clustered normal data miss the true mean 0; `resampled` names the units."""
    rng = np.random.default_rng(5)
    count = 0
    for _ in range(RUNS):
        values = np.repeat(rng.normal(0, 1, PROMPTS), SEEDS) + rng.normal(0, 0.3, PROMPTS * SEEDS)
        found = estimate(values[:, None], [str(unit) for unit in resampled])
        count += not found.low <= 0 <= found.high
    return count


def test_intervals_cover_the_mean_where_seeds_share_their_prompt() -> None:
    """300 intervals miss no more often than 7 % of the time, at a false-alarm level of 1e-5; the control fails.

    The control resamples images as if seeds of one prompt were independent.
    """
    most = stats.binom.isf(FALSE_ALARM, RUNS, 1 - PERCENTILE_COVERS)
    assert misses(np.repeat(np.arange(PROMPTS), SEEDS)) <= most
    assert misses(np.arange(PROMPTS * SEEDS)) > most


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    """Its ends are 1.96 standard errors from the mean, to five standard errors of a quantile of 2000 draws."""
    values = np.random.default_rng(1).normal(2, 3, 400)
    found = estimate(values[:, None], [str(k) for k in range(400)])
    error = values.std() / 400**0.5
    of_quantile = error * (0.025 * 0.975 / DRAWS) ** 0.5 / stats.norm.pdf(1.96)
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=5 * of_quantile)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=5 * of_quantile)


def test_a_statistic_sees_the_means_of_all_columns() -> None:
    """A ratio of two columns that are proportional has no spread."""
    x = np.random.default_rng(2).uniform(1, 2, 30)
    found = estimate(np.stack([x, 4 * x], 1), [str(k // 3) for k in range(30)], lambda m: m[..., 1] / m[..., 0])
    assert (found.value, found.low, found.high) == pytest.approx((4, 4, 4))
    assert (found.images, found.units, found.unit) == (30, 10, "prompts")


def test_one_prompt_resamples_its_images() -> None:
    """64 seeds of one prompt have an interval, and it says what was resampled."""
    found = estimate(np.random.default_rng(3).normal(0, 1, (64, 1)), ["a red car"] * 64)
    assert found.unit == "images"
    assert found.units == 64
    assert found.high - found.low > 0.2


def test_no_values_no_interval() -> None:
    """Nothing gives NaN, and a ratio by zero no interval."""
    assert np.isnan(estimate(np.empty((0, 1)), []).value)
    never = estimate(np.zeros((5, 1)), list("abcde"), lambda m: m[..., 0] * np.nan)
    assert np.isnan(never.low)


def test_one_unit_says_nothing_of_others() -> None:
    """One image has a value and no interval, so no claim of it is decided; two have one."""
    one, two = (estimate(np.ones((n, 1)), ["a red car"] * n) for n in (1, 2))
    assert one.value == two.value == two.low == two.high == 1.0
    assert np.isnan([one.low, one.high]).all()
    assert verdict(one, 0.0) == UNDECIDED
    assert str(one) == "1.000"


def test_a_ratio_that_some_draws_do_not_have_is_no_warning() -> None:
    """A denominator that is 0 in a few draws: an interval, without a word on standard error."""
    values = np.array([[1.0, float(k > 0)] for k in range(4)])  # one draw in 256 is of the first prompt alone
    found = estimate(values, list("abcd"), lambda m: m[..., 0] / m[..., 1])
    assert found.low >= 1.0


def test_wilson_by_hand() -> None:
    """8 of 10: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    z = stats.norm.isf(0.025)
    middle, reach = 0.8 + z**2 / 20, z * (0.016 + z**2 / 400) ** 0.5
    assert wilson(8, 10) == pytest.approx(((middle - reach) / (1 + z**2 / 10), (middle + reach) / (1 + z**2 / 10)))
