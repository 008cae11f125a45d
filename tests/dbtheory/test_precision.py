"""MSDDA against the product of the kernels by quadrature, and against the experts' own transitions."""

import math

import pytest
import torch
from scipy import integrate, stats

import toys
from dbtheory import ExactExperts, FunctionReward, LinearReward, MeanBlend, PrecisionBlend, Preference, VPLinear, sample
from dbtheory.blend import Step
from dbtheory.kernels import exact_kernels
from dbtheory.precision import fuse, log_normalizer
from dbtheory.steps import ddpm_step, posterior_variance
from tests.chance import alarms
from tests.dbtheory.bayes import log_posterior
from tests.dbtheory.strategies import normal, symmetric, uniform

HALVES = Preference({"east": 0.3, "north": 0.7}, 0.8)
EYE = torch.eye(2, dtype=torch.float64)
SPREAD = {"base": 1.0, "east": 0.5, "north": 2.0}
LONG = {
    "base": torch.tensor([[1.0, 0.3], [0.3, 0.8]], dtype=torch.float64),
    "east": torch.tensor([[0.5, -0.2], [-0.2, 1.5]], dtype=torch.float64),
    "north": 2.0,
}


def ring(kind="score"):
    toy = toys.get("ring-of-six")
    return ExactExperts(toy.prior, toy.rewards, toy.alpha, toy.schedule, kind)


def cloud(n=50):
    return 2 * torch.randn(n, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def step(n, t=0.4, t_next=0.3):
    return Step(3, 10, t, t_next, torch.zeros(n, dtype=torch.float64))


def random_kernels(m, n, dim, seed):
    """Means (m, n, dim) and covariances (m, n, dim, dim), and coefficients of which the first is negative."""
    generator = torch.Generator().manual_seed(seed)
    covariances = symmetric(m * n, uniform(0.5, 2.0, (m * n, dim), generator), generator).reshape(m, n, dim, dim)
    c = uniform(0.2, 1.0, (m,), generator)
    c[0] = -0.1
    c[1:] *= 1.1 / c[1:].sum()
    return c, normal((m, n, dim), generator), covariances


def test_fused_step_is_the_product_of_the_kernels():
    """Mean, variance and mass of `prod_i N(mu_i, s_i^2)^c_i`, by quadrature of the product, base negative included."""
    c, means, covariances = random_kernels(4, 3, 1, seed=0)
    shares, root = fuse(c[:, None], covariances)
    mean = (shares @ means[..., None]).sum(0).flatten()
    mass = log_normalizer(c, means, covariances)
    for i in range(3):
        kernels = [stats.norm(float(means[j, i, 0]), float(covariances[j, i, 0, 0]) ** 0.5) for j in range(4)]

        def density(y, k, kernels=kernels, centre=float(mean[i])):
            return (y - centre) ** k * math.exp(sum(float(c[j]) * kernel.logpdf(y) for j, kernel in enumerate(kernels)))

        span = (float(mean[i]) - 12, float(mean[i]) + 12)
        zeroth, first, second = (
            integrate.quad(density, *span, args=(k,), epsabs=1e-12, epsrel=1e-10)[0] for k in range(3)
        )
        assert float(mass[i]) == pytest.approx(math.log(zeroth), rel=1e-9)
        assert first / zeroth == pytest.approx(0.0, abs=1e-9)
        assert second / zeroth == pytest.approx(float(root[i, 0, 0] ** 2), rel=1e-9)


def test_fused_density_is_the_product_in_two_dimensions():
    """`log C + log N(y; mu, S)` is `sum_i c_i log N(y; mu_i, S_i)` at every y, full covariances, one a point."""
    c, means, covariances = random_kernels(3, 5, 2, seed=1)
    shares, root = fuse(c[:, None], covariances)
    mean = (shares @ means[..., None]).sum(0)[..., 0]
    torch.testing.assert_close(shares.sum(0), EYE.expand(5, 2, 2))
    fused = torch.distributions.MultivariateNormal(mean, root @ root.mT)
    log_c = log_normalizer(c, means, covariances)
    for y in cloud(6):
        kernels = torch.distributions.MultivariateNormal(means, covariances)
        expected = (c[:, None] * kernels.log_prob(y)).sum(0)
        torch.testing.assert_close(log_c + fused.log_prob(y), expected, rtol=1e-10, atol=1e-10)


def test_normalizer_at_equal_variances():
    """With one variance s^2 it is `-Var_c(mu) / (2 s^2)`, whatever the sign of the coefficients (MATH.md 7)."""
    c, means, _ = random_kernels(3, 7, 2, seed=2)
    blended = (c[:, None, None] * means).sum(0)
    spread = (c[:, None] * means.square().sum(-1)).sum(0) - blended.square().sum(-1)
    actual = log_normalizer(c, means, (0.3 * EYE).expand(3, 1, 2, 2))
    torch.testing.assert_close(actual, -spread / 0.6, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.8])
@pytest.mark.parametrize("common", [0.7, torch.tensor([[0.7, 0.2], [0.2, 0.9]], dtype=torch.float64)])
def test_equal_variances_are_db_mpa(scale, common):
    """Adapters that share the scheduler's variance: MSDDA is DB-MPA, for any lambda (MATH.md 7)."""
    experts, x = ring(), cloud()
    preference = Preference({"east": 0.3, "north": 0.7}, scale)
    blend = PrecisionBlend(preference, dict.fromkeys(experts.names, common))
    expected = MeanBlend(preference)(experts, x, 0.4, step(50))
    torch.testing.assert_close(blend(experts, x, 0.4, step(50)), expected, rtol=1e-12, atol=1e-12)


def test_isotropic_variances_are_db_with_other_coefficients():
    """Numbers alone: `rho_i = c_i / (s_i^2 L)`, and noise of variance 1/L, on events of any shape."""
    experts, x = ring(), cloud()
    shares = {name: c / SPREAD[name] for name, c in HALVES.coefficients().items()}
    total = sum(shares.values())
    predictions = experts.predict(x, 0.4, list(shares))
    expected = sum(share / total * p for share, p in zip(shares.values(), predictions, strict=True))
    blend = PrecisionBlend(HALVES, SPREAD)
    torch.testing.assert_close(blend(experts, x, 0.4, step(50)), expected, rtol=1e-12, atol=1e-12)
    images = torch.ones(5, 3, 4, 4, dtype=torch.float32)
    torch.testing.assert_close(blend.noise(images, 0.01, images, step(5)), 0.1 * total**-0.5 * images)


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize("variances", [SPREAD, LONG])
def test_same_step_in_every_parametrization(kind, variances):
    """The shares sum to I, so that whole trajectories agree in every parametrisation."""
    runs = [
        sample(ring(language), PrecisionBlend(HALVES, variances), 20, 10, torch.Generator().manual_seed(0))
        for language in ("score", kind)
    ]
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", ["euler", "ddpm", "ddim"])
def test_steps_have_the_fused_moments(method):
    """One step of a large batch from one point: mean and covariance are the product's, in own-variance units (1e-5)."""
    experts, n = ring("x0"), 40_000
    x, grid = cloud(1).expand(n, 2), torch.tensor([0.4, 0.3], dtype=torch.float64)
    y = sample(experts, PrecisionBlend(HALVES, LONG), n, 1, torch.Generator().manual_seed(0),
               x_T=x, grid=grid, method=method, eta=0.7)  # fmt: skip
    plain = {
        name: sample(experts, MeanBlend(Preference(*arguments)), 1, 1, x_T=x[:1], grid=grid, method=method, eta=0.7,
                     noise=torch.zeros(1, 1, 2, dtype=torch.float64), phase=torch.zeros(1, dtype=torch.float64))[0]
        for name, arguments in {"base": ({"east": 1, "north": 0}, 0), "east": ({"east": 1, "north": 0},),
                                "north": ({"east": 0, "north": 1},)}.items()
    }  # fmt: skip
    unit = {"euler": VPLinear().diffusion_squared(0.4) * 0.1, "ddpm": posterior_variance(VPLinear(), 0.4, 0.3)}
    unit["ddim"] = 0.49 * unit["ddpm"]
    covariances = {name: unit[method] * (s if isinstance(s, torch.Tensor) else s * EYE) for name, s in LONG.items()}
    precision = sum(c * torch.linalg.inv(covariances[name]) for name, c in HALVES.coefficients().items())
    pull = sum(c * torch.linalg.solve(covariances[name], plain[name]) for name, c in HALVES.coefficients().items())
    mean, root = torch.linalg.solve(precision, pull), torch.linalg.cholesky(precision)
    white = ((y - mean) @ root).numpy()
    values = [white[:, 0], white[:, 1], white[:, 0] * white[:, 1]]
    p_values = [float(stats.ttest_1samp(value, 0.0).pvalue) for value in values]
    p_values += [float(stats.kstest(white[:, i], "norm").pvalue) for i in (0, 1)]
    assert not alarms(p_values)
    assert alarms([float(stats.kstest(1.05 * white[:, 0], "norm").pvalue)])


@pytest.mark.parametrize(("t", "t_next"), [(0.6, 0.4), (0.2, 0.0)])
def test_exact_kernels_are_the_experts_own_moments(t, t_next):
    """Mean of the ancestral step and covariance are those of `x_s | x_t`, by Bayes' rule on a lattice of x_0."""
    experts, x = ring("x0"), cloud(3)
    kernels = exact_kernels(experts)(x, t, t_next)
    schedule = experts.schedule
    ratio = schedule.alpha(t) * schedule.variance(t_next) / (schedule.alpha(t_next) * schedule.variance(t))
    for name in experts.names:
        predicted = ddpm_step(x, experts.predict(x, t, [name])[0], t, t_next, 0 * x, schedule)
        axis = torch.linspace(-6, 6, 241, dtype=torch.float64)
        nodes = torch.cartesian_prod(axis, axis)
        for i in range(3):
            weights = log_posterior(experts.targets[name], schedule, x[i], t, nodes).exp()
            # q(x_s | x_t, x_0) is Gaussian with this mean, and its variance is the sampler's own
            means = ratio * x[i] + (schedule.alpha(t_next) - ratio * schedule.alpha(t)) * nodes
            mean = weights @ means
            spread = (weights * (means - mean).T) @ (means - mean)
            torch.testing.assert_close(predicted[i], mean, rtol=1e-8, atol=1e-8)
            expected = spread + posterior_variance(schedule, t, t_next) * EYE
            torch.testing.assert_close(kernels[name][i], expected, rtol=1e-7, atol=1e-9)


def test_exact_kernels_sample_one_gaussian_expert_exactly_in_any_steps():
    """A Gaussian's transitions are Gaussian: with its own moments even three steps have the exact law (KS, 1e-5).

    The plain ancestral sampler, whose last step adds no noise, is told apart.
    """
    toy = toys.get("two-modes")
    prior = type(toy.prior)(
        torch.ones(1, dtype=torch.float64),
        torch.tensor([[0.7]], dtype=torch.float64),
        torch.tensor([[[0.5]]], dtype=torch.float64),
    )
    experts, preference = (
        ExactExperts(prior, {"up": LinearReward(EYE[0, :1])}, 1.0, toy.schedule),
        Preference({"up": 1}),
    )
    law = stats.norm(1.2, 0.5**0.5)

    def p_value(blend):
        x = sample(experts, blend, 20_000, 3, torch.Generator().manual_seed(0))
        return float(stats.kstest(x[:, 0].numpy(), law.cdf).pvalue)

    assert not alarms([p_value(PrecisionBlend(preference, exact_kernels(experts)))])
    assert alarms([p_value(MeanBlend(preference))])


def test_one_expert_is_itself_bit_for_bit():
    """A one-hot preference is that expert's prediction, and evaluates no other."""
    experts, x = ring(), cloud()
    for variances in (SPREAD, LONG, exact_kernels(experts)):
        blend = PrecisionBlend(Preference({"east": 1, "north": 0}), variances)
        assert torch.equal(blend(experts, x, 0.4, step(50)), experts.predict(x, 0.4, ["east"])[0])


@pytest.mark.parametrize("variances", [SPREAD, LONG])
def test_preferences_per_sample_and_by_progress(variances):
    """One preference a sample is each sample's own blend, and a function of progress is its value at the step."""
    experts, x = ring(), cloud(3)
    weights = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    blend = PrecisionBlend(Preference({"east": weights, "north": 1 - weights}, 0.9), variances)
    together, noise = blend(experts, x, 0.4, step(3)), blend.noise(x, 0.1, x, step(3))
    moving = PrecisionBlend(Preference({"east": lambda p: 0.3 * p, "north": lambda p: 1 - 0.3 * p}, 0.9), variances)
    for i, w in enumerate(weights.tolist()):
        alone = PrecisionBlend(Preference({"east": w, "north": 1 - w}, 0.9), variances)
        row = x[i : i + 1]
        torch.testing.assert_close(together[i : i + 1], alone(experts, row, 0.4, step(1)), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(noise[i : i + 1], alone.noise(row, 0.1, row, step(1)), rtol=1e-12, atol=1e-12)
    there = PrecisionBlend(Preference({"east": 0.1, "north": 0.9}, 0.9), variances)
    torch.testing.assert_close(moving(experts, x, 0.4, step(3)), there(experts, x, 0.4, step(3)))
    with pytest.raises(ValueError, match="a sample: 5 samples, received 3"):
        blend(experts, cloud(5), 0.4, step(5))


LAST = torch.tensor([[1.0, 0.0], [0.5, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("scale", "variances", "said"),
    [
        (2.0, {"base": 0.1, "east": 1.0, "north": 1.0}, "not positive definite, smallest eigenvalue -8"),
        (2.0, LONG | {"base": 0.1 * EYE}, "not positive definite"),
        (1.0, {"base": 1.0, "east": 1.0}, "variances are needed"),
        (1.0, {"base": 1.0, "east": 1.0, "north": 1.0, "south": 1.0}, "variances are needed"),
        (1.0, {"base": 1.0, "east": -1.0, "north": 1.0}, '"east" must be positive'),
        (1.0, {"base": 1.0, "east": 1.0, "north": math.nan}, '"north" must be positive'),
        (1.0, {"base": math.inf, "east": 1.0, "north": 1.0}, '"base" must be positive'),
        (1.0, {"base": EYE, "east": 1.0, "north": LAST}, '"north" must be positive'),
        (1.0, {"base": EYE, "east": -EYE, "north": 1.0}, '"east" must be positive'),
        (1.0, {"base": EYE, "east": torch.eye(3, dtype=torch.float64), "north": 1.0}, '"base" must be a number'),
        (1.0, {"base": EYE[0], "east": 1.0, "north": 1.0}, '"base" must be a number'),
    ],
)
def test_bad_variances(scale, variances, said):
    """A precision that is not positive definite, and variances that are no variances, are ValueErrors."""
    with pytest.raises(ValueError, match=said):
        PrecisionBlend(Preference({"east": 0.3, "north": 0.7}, scale), variances)


def test_bad_kernels():
    """Kernels of other experts, other methods and laws without a closed form are refused where they are used."""
    experts, x = ring(), cloud(4)
    blend = PrecisionBlend(HALVES, lambda x, t, t_next: {"base": EYE.expand(len(x), 2, 2)})
    with pytest.raises(ValueError, match="variances are needed"):
        blend(experts, x, 0.4, step(4))
    with pytest.raises(ValueError, match='method="ddpm"'):
        sample(experts, PrecisionBlend(HALVES, exact_kernels(experts)), 4, 3, torch.Generator(), method="euler")
    with pytest.raises(ValueError, match=r"need points \(n, 2\)"):
        PrecisionBlend(HALVES, LONG).noise(torch.ones(4, 3), 1.0, torch.ones(4, 3), step(4))
    toy = toys.get("two-modes")
    gridded = ExactExperts(toy.prior, {"step": FunctionReward(lambda x: x[..., 0].tanh())}, 1.0, toy.schedule)
    with pytest.raises(ValueError, match='need Gaussian mixtures, received a GridLaw for "step"'):
        exact_kernels(gridded)
