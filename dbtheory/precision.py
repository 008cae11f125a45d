"""MSDDA: Gaussian steps fused by their precisions (MATH.md 7)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dbtheory.blend import Step, weighted_sum
from dbtheory.experts import Experts, Points
from dbtheory.preference import Preference


@dataclass(frozen=True)
class PrecisionBlend:
    """MSDDA for isotropic kernels `N(mu_i, s_i^2 I)`: the step-wise optimum of MATH.md 7.

    Precisions add: `L = sum_i c_i / s_i^2`, so it is DB-MPA with coefficients `rho_i = c_i / (s_i^2 L)` and
    step variance `1 / L`. `variances` maps "base" and every expert of the preference to `s_i^2`, in units of
    the sampler's own step variance. All equal: DB-MPA.

    Raises:
        ValueError: a variance that is missing, unknown, or not positive and finite; `L` not positive.
    """

    preference: Preference
    variances: Mapping[str, Tensor | float | int]

    def __post_init__(self) -> None:
        expected = self.preference.coefficients()
        if set(self.variances) != set(expected):
            raise ValueError(f"variances are needed for {sorted(expected)}, received {sorted(self.variances)}")
        for name, variance in self.variances.items():
            if not (0 < float(variance) < math.inf):
                raise ValueError(f'variance of "{name}" must be positive and finite, received {variance}')
        if self._precision() <= 0:
            raise ValueError(
                f"the blended precision sum c_i / s_i^2 is {self._precision():.6g}, not positive: no such "
                f"Gaussian step exists; lower kl_scale ({self.preference.kl_scale:.6g})"
            )

    @property
    def noise_variance(self) -> float:
        """`1 / L`: the blended step's variance, in units of the sampler's own."""
        return 1.0 / self._precision()

    def coefficients(self) -> dict[str, float]:
        """`rho_i`, which sum to 1."""
        total = self._precision()
        return {name: c / float(self.variances[name]) / total for name, c in self.preference.coefficients().items()}

    def __call__(self, experts: Experts, x: Points, t: Tensor | float, step: Step) -> Points:
        self.preference.validate(experts.names)
        return weighted_sum(experts, x, t, self.coefficients())

    def _precision(self) -> float:
        return sum(c / float(self.variances[name]) for name, c in self.preference.coefficients().items())
