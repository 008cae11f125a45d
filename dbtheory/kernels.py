"""The exact moments of each expert's own step, where its law is a Gaussian mixture (MATH.md 7)."""

from torch import Tensor, eye

from dbtheory.experts import ExactExperts
from dbtheory.mixture import GaussianMixture
from dbtheory.precision import Kernels
from dbtheory.schedule import Time
from dbtheory.steps import posterior_gain, posterior_variance


def exact_kernels(experts: ExactExperts) -> Kernels:
    """Each expert's own `Cov[x_s | x_t] = v I + gain^2 Cov_i[x_0 | x_t]`, s = t_next, for method "ddpm".

    `q(x_s | x_t, x_0)` has variance v and a mean that takes gain times x_0, over which the expert's posterior is
    averaged: with the sampler's mean these are the kernel's exact first two moments. ValueError where a target
    is no GaussianMixture, whose posterior has a closed form.
    """
    laws: dict[str, GaussianMixture] = {}
    for name, law in experts.targets.items():
        if not isinstance(law, GaussianMixture):
            raise ValueError(f'exact kernels need Gaussian mixtures, received a {type(law).__name__} for "{name}"')
        laws[name] = law

    def kernels(x: Tensor, t: Time, t_next: Time) -> dict[str, Tensor]:
        gain, variance = (f(experts.schedule, t, t_next) for f in (posterior_gain, posterior_variance))
        own = variance * eye(x.shape[-1], dtype=x.dtype, device=x.device)
        return {name: own + gain**2 * law.posterior(experts.schedule, x, t).covariance for name, law in laws.items()}

    return kernels
