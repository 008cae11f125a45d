"""Weights `d log omega = 1/2 g^2 (|s_bar|^2 - sum_i c_i |s_i|^2) dt` carry a blend's samples to the preference's
target, for a KL scale below and above 1, and their mean is `Z_w / prod_i Z_i^(c_i)`.

Blends alone sample another law (paper Lemma 1 bounds the drift's error, not that of the samples). One run, weighed but
not resampled, gives the blend (equal weights), the correction, and the wrong sign.

Two families of statistical rows, each with a false-alarm level of 1e-5, Bonferroni-corrected. Ring of six: 21 two-sided
tests (3 settings; the mean weight and 6 modes' masses), |z| by the central limit theorem, normal quantile at 1e-5/42.
Monte Carlo rate: 1 two-sided test, normal quantile at 1e-5/2 times the fitted exponent's standard error.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from scipy import stats
from torch import Tensor

import toys
from dbtheory import ExactExperts, GaussianMixture, MeanBlend, Preference, sample, tilt
from dbtheory.correct import FeynmanKac, Trace
from dbtheory.sampler import time_grid
from dbtheory.tilt import log_normalizer
from proofs_check.claim import Row

SOURCE = "beyond the paper: Lemma 1's error removed; MATH.md 8"
SETTINGS = [(0.5, 1.0), (1.0, 0.5), (1.0, 1.5)]  # weight of the first reward, KL scale
FALSE_ALARM = 1e-5
# as many particles as leave the bias of so many steps within a standard error
PARTICLES, STEPS, MODES = 6000, 400, 6
# two-sided, over the mean weight and every mode's mass in every setting
Z_BOUND = float(stats.norm.isf(FALSE_ALARM / 2 / (len(SETTINGS) * (1 + MODES))))
SIZES, RUNS, RUN_STEPS = (32, 128, 512), 80, 20


def check() -> Iterator[Row]:
    for w, scale in SETTINGS:
        yield from _one_run(w, scale)
    yield _monte_carlo_rate()
    yield from _forms_agree()


def _one_run(w: float, scale: float) -> Iterator[Row]:
    toy = toys.get("ring-of-six")
    assert isinstance(toy.prior, GaussianMixture)
    experts = ExactExperts(toy.prior, toy.rewards, toy.alpha, toy.schedule)
    (first, r1), (second, r2) = toy.rewards.items()
    preference, combined = Preference({first: w, second: 1 - w}, scale), w * r1 + (1 - w) * r2
    target = tilt(toy.prior, combined, toy.alpha / scale)
    assert isinstance(target, GaussianMixture)
    trace = Trace()
    x = sample(
        experts, MeanBlend(preference), PARTICLES, STEPS, torch.Generator().manual_seed(7),
        method="euler", grid=time_grid(toy.schedule, STEPS, power=2.0), trace=trace,
    )  # fmt: skip
    log_weights, name = trace.log_weights[-1], f"ring of six, w = {w:g}, lambda = {scale:g}"
    exact = float(log_normalizer(toy.prior, combined, toy.alpha / scale)) - scale * sum(
        share * float(log_normalizer(toy.prior, reward, toy.alpha)) for share, reward in ((w, r1), (1 - w, r2))
    )
    yield Row(f"{name}: mean weight against Z_w/prod Z_i^c_i, in standard errors", _z(log_weights, exact), Z_BOUND)
    what = f"negative control: {name}: mean of 1/omega against Z_w/prod Z_i^c_i, in standard errors"
    yield Row(what, _z(-log_weights, exact), Z_BOUND, ">=")
    corrected, alone, wrong = f"{name}: corrected", f"{name}: blend alone", f"negative control: {name}: wrong sign"
    for sign, what in ((1, corrected), (0, alone), (-1, wrong)):
        z, distance = _mode_errors(x, sign * log_weights, target)
        yield Row(
            f"{what}: largest error of a mode's mass, in standard errors (total variation {distance:.3f})",
            z,
            Z_BOUND,
            "<=" if sign == 1 else ">=",
        )


def _z(log_weights: Tensor, log_mean: float) -> float:
    relative = (log_weights - log_mean).exp()
    return float((relative.mean() - 1).abs() / (relative.std() / len(relative) ** 0.5))


def _mode_errors(x: Tensor, log_weights: Tensor, target: GaussianMixture) -> tuple[float, float]:
    """Masses of the modes (each sample counts for the nearest) against the target's exact component weights.

    The largest error in standard errors of a self-normalised mean, over modes with at least 1 % of the mass (fewer
    samples than a hundred have no normal law), and the total variation over all.
    """
    weights = log_weights.softmax(0)
    belongs = torch.nn.functional.one_hot(torch.cdist(x, target.means).argmin(-1), len(target.means))
    masses = weights @ belongs.to(weights)
    deviations = (weights.square() @ (belongs - masses).square()).sqrt()
    errors = masses - target.weights
    return float((errors.abs() / deviations)[target.weights > 0.01].max()), 0.5 * float(errors.abs().sum())


def _monte_carlo_rate() -> Row:
    """Bimodal prior in 1-D, opposite rewards in equal parts, resampled; root mean squares over independent runs.

    Weights are bounded here. At lambda > 1 they are not, and few particles show a smaller exponent.
    """
    experts, blend = _line({"right": 0.5, "left": 0.5}, 1.0)
    exact = _log_normalizer(experts, blend, 100_000, FeynmanKac(ess=0.0), 0)
    errors = [
        math.sqrt(
            sum((_log_normalizer(experts, blend, n, FeynmanKac(), 1 + run) - exact) ** 2 for run in range(RUNS)) / RUNS
        )
        for n in SIZES
    ]
    slope = float(np.polyfit(np.log(SIZES), np.log(errors), 1)[0])
    shown = ", ".join(f"{n}: {error:.3g}" for n, error in zip(SIZES, errors, strict=True))
    # a root mean square over k runs has relative deviation 1/sqrt(2k); a line's slope comes from its two ends
    deviation = math.sqrt(1 / RUNS) / math.log(SIZES[-1] / SIZES[0])
    return Row(
        f"log-normaliser's error in the number of particles: |fitted exponent {slope:.3f} + 1/2| ({shown})",
        abs(slope + 0.5),
        float(stats.norm.isf(FALSE_ALARM / 2)) * deviation,
    )


def _forms_agree() -> Iterator[Row]:
    """Same ancestral paths, weighed in both forms: their difference falls with the step, like h log(1/h)."""
    experts, blend = _line({"right": 1.0, "left": 0.0}, 1.5)
    gaps = []
    for steps in (40, 320):
        continuous, discrete = (
            _log_normalizer(experts, blend, 2000, FeynmanKac(ess=0.0, form=form), 0, steps=steps, method="ddpm")
            for form in ("continuous", "discrete")
        )
        gaps.append(abs(continuous - discrete))
    yield Row(
        f"continuous and discrete log-normaliser apart at 320 ancestral steps ({gaps[0]:.3g} at 40)",
        gaps[1],
        0.25 * gaps[0],
    )


def _line(weights: Mapping[str, float], scale: float) -> tuple[ExactExperts, MeanBlend]:
    toy = toys.get("two-modes")
    experts = ExactExperts(toy.prior, {name: toy.rewards[name] for name in weights}, toy.alpha, toy.schedule)
    return experts, MeanBlend(Preference(weights, scale))


def _log_normalizer(
    experts: ExactExperts, blend: MeanBlend, n: int, correct: FeynmanKac, seed: int, *, steps: int = RUN_STEPS,
    method: str = "euler",
) -> float:  # fmt: skip
    trace = Trace()
    sample(experts, blend, n, steps, torch.Generator().manual_seed(seed), method=method, correct=correct, trace=trace)
    return trace.log_normalizer
