"""Exact blending: Feynman-Kac weights turn a blend's samples into draws of its target (MATH.md 8).

A blend follows the drift with `s_bar = sum_i c_i s_i`, whose law is not `q_t ~ prod_i p_{i,t}^{c_i}`. Over a
generation step dt > 0 its mass is missing by

    d log omega = 1/2 g^2 (|s_bar|^2 - sum_i c_i |s_i|^2) dt = -1/2 g^2 Var_c(s) dt,

so samples that carry these weights follow q_t, and at t = 0 the preference's target `prod_i p_i^{c_i} / Z`.
The mean weight is `Z = integral of prod_i p_i^{c_i}`. Neither a reward nor a further evaluation is needed.

Neglected: the start. Samples begin at N(0, sigma(T)^2 I) and not at q_T; the two differ by what alpha(T) leaves
of the data, as in every sampler. Beyond it the error is the sampler's, first order in the step. All of this supposes
exact experts (MATH.md 9): trained or guided ones are corrected towards no density that is known.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dbtheory.blend import AffineBlender, Blender, Step, active_names, combine
from dbtheory.experts import Experts, Points
from dbtheory.parametrization import convert
from dbtheory.preference import Amount
from dbtheory.resampling import effective_size, systematic
from dbtheory.schedule import NoiseSchedule, Time
from dbtheory.steps import posterior_gain, posterior_variance, step_variance

FORMS = ("continuous", "discrete")


@dataclass(frozen=True)
class FeynmanKac:
    """Weighs the samples of a blend, and resamples them where the effective sample size falls below `ess`.

    `ess` is a share of the number of samples, in [0, 1]: 0 resamples only at the last step, which always happens
    and gives equally weighted samples; 1 resamples at every step. Copies of one sample part with the next noise:
    those of the last step stay twins under method "ddpm", which ends without any.

    `form="continuous"` takes the weight above at the step's start; `form="discrete"` takes the normaliser of the
    step's blended Gaussian kernels (MATH.md 7), which is the same thing for method "euler". No weight makes up for the
    sampler: method "ddpm" is too narrow near the data where steps are few.

    Raises:
        ValueError: an `ess` outside [0, 1], an unknown form.
    """

    ess: float | int = 0.5
    form: str = "continuous"

    def __post_init__(self) -> None:
        if not 0 <= self.ess <= 1:
            raise ValueError(f"ess is a share of the samples, in [0, 1] (0 resamples at the end), received {self.ess}")
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {FORMS}, received {self.form!r}")


@dataclass
class Trace:
    """What a run leaves behind, filled by `sample`; one row a step, from noise to data, before its resampling.

    `ess (steps,)` is the effective sample size as a share of n; `log_weights (steps, n)` are those since the last
    resampling; `resamplings` are the steps that ended with one; `log_normalizer` estimates
    `log integral prod_i p_i^{c_i} = log Z_w - sum_i c_i log Z_i`, with `Z = E_pre[e^{r/alpha}]`.
    `certificate (n,)` belongs to the samples that `sample` returns: the integral of `1/2 g^2 Var_c(s) dt` along
    each one's own path. It is 0 where the experts agree, and negative where lambda > 1 goes beyond them.
    """

    ess: Tensor = field(default_factory=lambda: torch.empty(0))
    log_weights: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    resamplings: list[int] = field(default_factory=list)
    log_normalizer: float = 0.0
    certificate: Tensor = field(default_factory=lambda: torch.empty(0))

    def record(self, step: Step, log_weights: Tensor, log_normalizer: float) -> None:
        """Note the weights at a step; the first one clears what an earlier run left."""
        if step.index == 0:
            self.ess = torch.zeros(step.count, dtype=torch.float64)
            self.log_weights = torch.zeros(step.count, len(log_weights), dtype=torch.float64)
            self.resamplings = []
        self.ess[step.index] = effective_size(log_weights)
        self.log_weights[step.index] = log_weights
        self.log_normalizer = log_normalizer


class Particles:
    """The weights of one run's samples. Without a correction they are recorded, and never acted upon.

    Raises:
        ValueError: a blender that is no affine combination of experts, or a method that the correction cannot
            weigh; at a step, coefficients that differ between samples or change during the run, experts that are
            not there, or weights that are not finite.
    """

    def __init__(
        self,
        experts: Experts,
        blender: Blender,
        n: int,
        method: str,
        eta: float,
        correction: FeynmanKac | None,
        trace: Trace | None,
    ) -> None:
        for what, given, kind in (("correct", correction, FeynmanKac), ("trace", trace, Trace)):
            if given is not None and not isinstance(given, kind):
                raise ValueError(f"{what} must be a {kind.__name__}, received {given!r}; e.g. {what}={kind.__name__}()")
        if not isinstance(blender, AffineBlender):
            raise ValueError(
                f"Feynman-Kac weights need an affine combination of experts, received {type(blender).__name__}; "
                "use MeanBlend or InterpolatedBlend"
            )
        if correction is not None:
            _require_kernel(correction.form, method, eta)
        self.experts, self.blender, self.correction = experts, blender, correction
        self.trace = Trace() if trace is None else trace
        self.ancestral = correction is not None and correction.form == "discrete" and method != "euler"
        self.coefficients: dict[str, float] = {}
        self.log_weights = torch.zeros(n, dtype=torch.float64, device=experts.device)
        self.certificate = torch.zeros_like(self.log_weights)
        self.log_normalizer = 0.0  # of the weights before the last resampling

    def blend(self, x: Points, step: Step) -> Points:
        """The blender's prediction at `x`, by the evaluations that also weigh the samples."""
        self.coefficients = self._one_target(self.blender.coefficients(step))
        active = active_names(self.experts, self.coefficients)
        c = [self.coefficients[name] for name in active]
        predictions = self.experts.predict(x, step.t, active)
        blended = combine(predictions, c)
        schedule, span = self.experts.schedule, (step.t, step.t_next)
        variance = score_variance(predictions, blended, c, step.t, schedule, self.experts.parametrization)
        self.certificate = self.certificate + 0.5 * euler_rate(schedule, *span) * variance
        rate = ancestral_rate(schedule, *span) if self.ancestral else euler_rate(schedule, *span)
        self.log_weights = self.log_weights - 0.5 * rate * variance
        if not bool(self.log_weights.isfinite().all()):
            raise ValueError(
                f"the weights are not finite at step {step.index} (t = {float(step.t):.3g}); more steps help"
            )
        return blended

    def survivors(self, step: Step, uniform: Callable[[], Tensor]) -> Int64[Tensor, " n"] | None:
        """The indices of the samples that go on, or None where all do. Call it once after `blend`."""
        evidence = self.log_normalizer + float(self.log_weights.logsumexp(0)) - math.log(len(self.log_weights))
        self.trace.record(step, self.log_weights, evidence)
        kept = systematic(self.log_weights, uniform()) if self._is_due(step) else None
        if kept is not None:
            self.trace.resamplings.append(step.index)
            self.certificate = self.certificate[kept]
            self.log_weights, self.log_normalizer = torch.zeros_like(self.log_weights), evidence
        self.trace.certificate = self.certificate
        return kept

    def _is_due(self, step: Step) -> bool:
        # equal weights, as of a one-hot preference, have nothing to correct
        if self.correction is None or bool((self.log_weights == self.log_weights[0]).all()):
            return False
        return step.index == step.count - 1 or effective_size(self.log_weights) < self.correction.ess

    def _one_target(self, coefficients: Mapping[str, Amount]) -> dict[str, float]:
        """The same, as numbers; ValueError unless every sample and every step has these, and experts for them."""
        if any(isinstance(c, Tensor) for c in coefficients.values()):
            raise ValueError(
                "resampling mixes the samples of a call, so they must share one target, received one preference a "
                "sample; call sample once for each preference"
            )
        if self.coefficients and self.coefficients != coefficients:
            raise ValueError(
                f"a preference that changes with progress has no target to correct to, received {dict(coefficients)} "
                f"after {self.coefficients}; use a constant one"
            )
        missing = [name for name, c in coefficients.items() if c != 0 and name not in self.experts.names]
        if missing:
            raise ValueError(f"the blend needs experts {missing}; the experts are {list(self.experts.names)}")
        return {name: c for name, c in coefficients.items() if not isinstance(c, Tensor)}


def score_variance(
    predictions: Float[Tensor, "m n *event"],
    blended: Points,
    coefficients: Sequence[Amount],
    t: Tensor | float,
    schedule: NoiseSchedule,
    parametrization: str,
) -> Float[Tensor, " n"]:
    """`Var_c(s) = sum_i c_i |s_i - s_bar|^2 = sum_i c_i |s_i|^2 - |s_bar|^2` of the scores, signed, in float64.

    Predictions and their blend `sum_i c_i prediction_i` are in one parametrisation; the m coefficients are numbers or
    one number a sample `(n,)`, with `sum c = 1`.
    """
    # a parametrisation's affine map at x = 0 is its linear part, which is all that differences see
    apart = convert(predictions - blended, torch.zeros_like(blended), t, schedule, parametrization, "score")
    squares = apart.flatten(2).to(torch.float64).square().sum(-1)
    weights = [torch.as_tensor(c, dtype=torch.float64, device=squares.device) for c in coefficients]
    return (torch.stack(torch.broadcast_tensors(squares[0], *weights)[1:]) * squares).sum(0)


def euler_rate(schedule: NoiseSchedule, t: Time, t_next: Time) -> Tensor:
    """`g(t)^2 (t - t_next)`: over a step, `log omega` grows by `-1/2 rate Var_c(s)`."""
    return step_variance("euler", schedule, t, t_next, eta=1.0)


def ancestral_rate(schedule: NoiseSchedule, t: Time, t_next: Time) -> Tensor:
    """The rate at which this is the ancestral kernels' `-Var_c(mu) / (2 variance)` (MATH.md 7).

    It is the integral of g^2 over the step, were every expert's x0, and not its score, constant in it. At
    t_next = 0 those kernels are points and that integral diverges, while the scores' does not: the last step
    takes Euler's rate.
    """
    if float(schedule.variance(t_next)) == 0:
        return euler_rate(schedule, t, t_next)
    mean_by_score = posterior_gain(schedule, t, t_next) * schedule.variance(t) / schedule.alpha(t)
    return mean_by_score**2 / posterior_variance(schedule, t, t_next)


def _require_kernel(form: str, method: str, eta: float) -> None:
    if method == "ddim" and eta == 0:
        raise ValueError(
            'resampling copies samples, and method "ddim" with eta=0 has no noise to tell the copies apart; '
            'use eta > 0, or method "ddpm" or "euler"'
        )
    if method == "ddim" and form == "discrete" and eta != 1:
        raise ValueError(
            f'form "discrete" needs kernels that reverse the noising, received "ddim" with eta={eta}; '
            'use eta=1, or form="continuous"'
        )
