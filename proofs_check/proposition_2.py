"""Drawing one expert a step (DB-MPA-LS) is a weak approximation of order 1 of DB-MPA's own chain, and both tend to the
law of the mean drift (paper Proposition 2). A step adds `h^2 g^4 Cov_c(score_i)` to the conditional covariance and
nothing to the conditional mean.

The paper's SDE 2 draws an independent Y_t at every instant t. Such a process is not jointly measurable, so its drift
has no integral: Y_t has to be read as the limit of draws kept over shorter and shorter steps, whose time averages
tend to the weights. The algorithm is that chain, and it is what is checked here.

Two families of statistical rows, each with a false-alarm level of 1e-5, Bonferroni-corrected. Moments of one step: 10
two-sided tests (5 moments, 2 orders), normal quantile at 1e-5/20. Particles: 3 tests, quantile of Kolmogorov's law at
1e-5/3, over sqrt(n) against a law and over sqrt(n/2) between two samples of n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from scipy import integrate, stats
from torch import Tensor

from dbtheory import (
    ExactExperts,
    GaussianMixture,
    LinearReward,
    MeanBlend,
    Preference,
    QuadraticReward,
    RectifiedFlow,
    SampledBlend,
    VPLinear,
    sample,
)
from dbtheory.blend import Blender
from dbtheory.chapman_kolmogorov import chain_densities
from dbtheory.fokker_planck import evolve
from dbtheory.moments import Moments, chain_moments
from dbtheory.schedule import NoiseSchedule
from proofs_check.claim import Row
from proofs_check.problems import random_problems

SOURCE = "paper Proposition 2; MATH.md 6"
FALSE_ALARM = 1e-5
END = 0.05  # chains stop a little above data, where experts are still evaluated
FULL, PARTIAL = Preference({"a": 0.3, "b": 0.7}), Preference({"a": 0.3, "b": 0.7}, 0.8)
WRONG = Preference({"a": 0.4, "b": 0.6}, 0.8)


def check() -> Iterator[Row]:
    yield from _moments()
    yield from _one_step()
    yield from _densities()
    yield from _particles()


def _moments() -> Iterator[Row]:
    """Gaussian experts, where all is exact; at a KL scale of 0.8 the base is drawn too."""
    orders, missed = [], []
    for schedule, method in ((VPLinear(), "euler"), (RectifiedFlow(), "ddpm")):
        experts = _gaussians(schedule)
        for preference, order in ((FULL, "iid"), (PARTIAL, "iid"), (FULL, "low-discrepancy")):
            limit = _moment_equation(experts, preference)
            mean = _chains(MeanBlend(preference), experts, method)
            drawn = _chains(SampledBlend(preference, order), experts, method)
            orders.append(_fitted_order([float((d - m).norm()) for d, m in zip(drawn, mean, strict=True)]))
            missed += [float((_extrapolated(chain) - limit).norm() / limit.norm()) for chain in (mean, drawn)]
    yield Row("weak order of LS towards MPA's chain, by exact moments: |order - 1|", _off_one(orders), 0.1)
    yield Row("limit of both chains against the moment equation of the mean drift, relative", max(missed), 1e-3)
    right, wrong = (_moment_equation(_gaussians(VPLinear()), preference) for preference in (PARTIAL, WRONG))
    off = float((wrong - right).norm() / right.norm())
    what = "negative control: moment equation for weights off by 0.1 against that for the right ones, relative"
    yield Row(what, off, 0.01, ">=")


def _one_step() -> Iterator[Row]:
    """The sampler with its noise set to zero: what is left of the covariance is the excess."""
    mean_off, excess_off = [], []
    for problem in random_problems(60, (1, 2, 3, 4), seed=20):
        rewards = dict(zip("ab", problem.rewards, strict=True))
        experts = ExactExperts(problem.prior, rewards, problem.alpha, problem.schedule)
        one_hot = [Preference({"a": a, "b": 1 - a}, scale) for a, scale in ((0, 0), (1, 1), (0, 1))]
        outputs = torch.stack([_noiseless(MeanBlend(p), experts, problem.x, problem.t) for p in one_hot])
        _, excess = _moments_over(outputs, PARTIAL)
        expected = _noiseless(MeanBlend(PARTIAL), experts, problem.x, problem.t)
        mean_off.append(_relative(_moments_over(outputs, PARTIAL)[0], expected))
        excess_off.append(_relative(excess, _excess(experts, problem.x, problem.t)))
    yield Row("one step's conditional mean, LS against MPA, relative", max(mean_off), 1e-12)
    yield Row("one step's excess covariance against h^2 g^4 Cov_c(score_i), relative", max(excess_off), 1e-10)
    what = "the moment recursion's excess covariance against the mean over x of h^2 g^4 Cov_c(score_i), relative"
    yield Row(what, _recursion_off(), 1e-10)
    critical = float(stats.norm.isf(FALSE_ALARM / 20))  # 5 moments, 2 orders, 2 sides
    yield Row("one step's moments by 50,000 draws of the sampler, largest |z|", _draws_off(PARTIAL), critical)
    what = "negative control: one step's moments by 50,000 draws for weights off by 0.1, largest |z|"
    yield Row(what, _draws_off(WRONG), critical, ">=")


def _densities() -> Iterator[Row]:
    """Two modes in one dimension: drifts that are not affine, laws without particles."""
    experts = _two_modes()
    fine = torch.linspace(-6, 6, 801, dtype=torch.float64)
    times = torch.linspace(1, END, 301, dtype=torch.float64)
    prior = evolve(lambda x, t: experts.predict(x, t, ["base"])[0], experts.schedule, fine, times)[-1]
    exact = experts.targets["base"].noised(experts.schedule, END).log_prob(fine.unsqueeze(-1)).exp()
    yield Row("Fokker-Planck with the base's own score against the noised prior, L1", _l1(prior - exact, fine), 5e-4)
    limit, other = (evolve(_mean_score(experts, p), experts.schedule, fine, times)[-1][::2] for p in (PARTIAL, WRONG))
    nodes = fine[::2].contiguous()
    drawn = [_chain_law(experts, PARTIAL, nodes, steps) for steps in (50, 100, 200)]
    yield Row(
        "weak order of LS towards the Fokker-Planck law of the mean drift: |order - 1|",
        _off_one([_fitted_order([_l1(density - limit, nodes) for density in drawn])]),
        0.1,
    )
    off = _l1(_extrapolated(drawn) - limit, nodes)
    yield Row("limit of LS against the Fokker-Planck law of the mean drift, L1", off, 2e-3)
    what = "negative control: Fokker-Planck law for weights off by 0.1 against that for the right ones, L1"
    yield Row(what, _l1(other - limit, nodes), 0.02, ">=")


def _particles() -> Iterator[Row]:
    experts, nodes, n, steps = _two_modes(), torch.linspace(-6, 6, 401, dtype=torch.float64), 20_000, 100
    grid = torch.linspace(1, END, steps + 1, dtype=torch.float64)
    runs = {
        name: sample(experts, blender, n, steps, torch.Generator().manual_seed(seed), method="euler", grid=grid)
        .squeeze(-1)
        .numpy()
        for seed, (name, blender) in enumerate(
            {"mean": MeanBlend(PARTIAL), "iid": SampledBlend(PARTIAL, "iid"), "low": SampledBlend(PARTIAL)}.items()
        )
    }
    law, wrong = (_distribution(_chain_law(experts, p, nodes, steps), nodes) for p in (PARTIAL, WRONG))
    tail = float(stats.kstwobign.isf(FALSE_ALARM / 3))
    one, two = tail / n**0.5, tail / (n / 2) ** 0.5
    ends = np.linspace(-4, 4, 801)
    apart = float(np.abs(law(ends) - _distribution(_mean_chain_law(experts, nodes, steps), nodes)(ends)).max())
    said = "Kolmogorov-Smirnov, 20,000 samples of LS"
    yield Row(f"{said} iid against the law of its chain", _ks(runs["iid"], law), one)
    # the chains' laws differ by O(h), which the bound allows for beside chance
    mean = f"as many of MPA, whose law lies {apart:.4f} from that of LS iid"
    yield Row(f"{said} iid against {mean}", _ks(runs["iid"], runs["mean"]), two + apart)
    yield Row(f"{said} low-discrepancy against {mean}", _ks(runs["low"], runs["mean"]), two + apart)
    what = f"negative control: {said} iid against the law of the chain for weights off by 0.1"
    yield Row(what, _ks(runs["iid"], wrong), one, ">=")


def _gaussians(schedule: NoiseSchedule) -> ExactExperts:
    prior = GaussianMixture(_t([1.0]), _t([[1.0, -0.5]]), _t([[[0.8, 0.3], [0.3, 0.4]]]))
    rewards = {
        "a": QuadraticReward(_t([[1.0, 0.2], [0.2, 0.1]]), _t([1.0, 0.0])),
        "b": QuadraticReward(_t([[-0.1, 0.2], [0.2, 1.0]]), _t([0.0, -2.0])),
    }
    return ExactExperts(prior, rewards, 1.0, schedule)


def _two_modes() -> ExactExperts:
    prior = GaussianMixture(_t([0.5, 0.5]), _t([[-1.0], [1.0]]), _t([[[0.1]], [[0.1]]]))
    return ExactExperts(
        prior, {"a": LinearReward(_t([1.5])), "b": QuadraticReward(_t([[1.0]]), _t([-1.0]))}, 1.0, VPLinear()
    )


def _chains(blender: Blender, experts: ExactExperts, method: str) -> list[Tensor]:
    """Mean and covariance at END, in one vector, for step counts that double."""
    start = experts.schedule.t_start
    grids = [torch.linspace(start, END, steps + 1, dtype=torch.float64) for steps in (75, 150, 300)]
    return [_flat(chain_moments(blender, experts, grid, method=method)) for grid in grids]


def _moment_equation(experts: ExactExperts, preference: Preference) -> Tensor:
    """Mean and covariance at END of the continuous process with the mean drift, by an ODE solver."""
    schedule, score = experts.schedule, _mean_score(experts, preference)
    start, eye = schedule.t_start, np.eye(2)

    def slope(t: float, state: np.ndarray) -> np.ndarray:
        mean, covariance = state[:2], state[2:].reshape(2, 2)
        g2 = float(schedule.diffusion_squared(t))
        corners = score(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64), t).numpy()
        gain = float(schedule.drift_rate(t)) * eye - g2 * (corners[1:] - corners[0]).T
        moved = gain @ covariance
        return np.concatenate([gain @ mean - g2 * corners[0], (moved + moved.T - g2 * eye).ravel()])

    state = np.concatenate([np.zeros(2), float(schedule.variance(start)) * eye.ravel()])
    solved = integrate.solve_ivp(slope, (start, END), state, method="DOP853", rtol=1e-9, atol=1e-11)
    return torch.from_numpy(solved.y[:, -1])


def _mean_score(experts: ExactExperts, preference: Preference) -> Callable[[Tensor, Tensor | float], Tensor]:
    weights = _weights(experts, preference)
    return lambda x, t: torch.einsum("m,mnd->nd", weights, experts.predict(x, t, experts.names))


def _noiseless(blender: Blender, experts: ExactExperts, x: Tensor, t: float) -> Tensor:
    """One Euler step of the sampler, a tenth of the way to data, with its noise set to zero."""
    n, grid = len(x), _t([t, 0.9 * t])
    phase = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = torch.zeros(1, *x.shape, dtype=torch.float64)
    return sample(experts, blender, n, 1, method="euler", x_T=x, noise=noise, phase=phase, grid=grid)


def _moments_over(outputs: Tensor, preference: Preference) -> tuple[Tensor, Tensor]:
    """Mean (n, d) and covariance (n, d, d) over experts drawn with the preference's weights, of outputs (m, n, d)."""
    weights = torch.tensor(list(preference.coefficients().values()), dtype=torch.float64)
    mean = torch.einsum("m,mnd->nd", weights, outputs)
    return mean, torch.einsum("m,mni,mnj->nij", weights, outputs - mean, outputs - mean)


def _excess(experts: ExactExperts, x: Tensor, t: float, h: float | None = None) -> Tensor:
    """`h^2 g^4 Cov_c(score_i)` at each x, h a tenth of t unless given."""
    scores = experts.predict(x, t, experts.names)
    h = 0.1 * t if h is None else h
    return (h * experts.schedule.diffusion_squared(t)) ** 2 * _moments_over(scores, PARTIAL)[1]


def _recursion_off() -> float:
    """Its mean over x ~ N(0, sigma^2 I), from which every chain starts: exact by the cubature of degree 3."""
    experts, t, s = _gaussians(VPLinear()), 0.7, 0.65
    blenders = (SampledBlend(PARTIAL, "iid"), MeanBlend(PARTIAL))
    drawn, mean = (chain_moments(b, experts, _t([t, s]), method="euler").covariance[0] for b in blenders)
    points = 2**0.5 * experts.schedule.sigma(t) * torch.cat([torch.eye(2), -torch.eye(2)]).double()
    return _relative(drawn - mean, _excess(experts, points, t, t - s).mean(0))


def _draws_off(preference: Preference) -> float:
    """Largest |z| of mean and second moments of draws at one point, against the values for PARTIAL."""
    problem = next(random_problems(1, (2,), seed=21))
    experts = ExactExperts(
        problem.prior, dict(zip("ab", problem.rewards, strict=True)), problem.alpha, problem.schedule
    )
    x, largest = problem.x[:1], 0.0
    mean, excess = _noiseless(MeanBlend(PARTIAL), experts, x, problem.t), _excess(experts, x, problem.t)[0]
    for order in ("iid", "low-discrepancy"):
        off = _noiseless(SampledBlend(preference, order), experts, x.expand(50_000, 2), problem.t) - mean
        values = torch.stack([off[:, 0], off[:, 1], off[:, 0] ** 2, off[:, 0] * off[:, 1], off[:, 1] ** 2])
        expected = _t([0.0, 0.0, excess[0, 0], excess[0, 1], excess[1, 1]])
        z = (values.mean(1) - expected) / (values.std(1) / values.shape[1] ** 0.5)
        largest = max(largest, float(z.abs().max()))
    return largest


def _chain_law(experts: ExactExperts, preference: Preference, nodes: Tensor, steps: int) -> Tensor:
    """The exact density at END of LS iid in one dimension."""
    grid = torch.linspace(experts.schedule.t_start, END, steps + 1, dtype=torch.float64)
    weights = _weights(experts, preference)
    return chain_densities(lambda x, t: experts.predict(x, t, experts.names), weights, experts.schedule, nodes, grid)[
        -1
    ]


def _mean_chain_law(experts: ExactExperts, nodes: Tensor, steps: int) -> Tensor:
    """Density of MPA's own chain at END: that of one expert with the mean score."""
    grid, score = torch.linspace(1, END, steps + 1, dtype=torch.float64), _mean_score(experts, PARTIAL)
    return chain_densities(lambda x, t: score(x, t)[None], _t([1.0]), experts.schedule, nodes, grid)[-1]


def _distribution(density: Tensor, nodes: Tensor) -> Callable[[np.ndarray], np.ndarray]:
    reached = integrate.cumulative_trapezoid(density.numpy(), nodes.numpy(), initial=0)
    return lambda q: np.interp(q, nodes.numpy(), reached)


def _ks(samples: np.ndarray, law: np.ndarray | Callable[[np.ndarray], np.ndarray]) -> float:
    return float(stats.kstest(samples, law).statistic)


def _weights(experts: ExactExperts, preference: Preference) -> Tensor:
    coefficients = preference.coefficients()
    return _t([coefficients[name] for name in experts.names])


def _extrapolated(values: Sequence[Tensor]) -> Tensor:
    """Richardson's limit from three step counts, each twice the one before, for errors in h and h^2."""
    first, second = (2 * fine - coarse for coarse, fine in pairwise(values))
    return (4 * second - first) / 3


def _fitted_order(errors: Sequence[float]) -> float:
    """From errors at step counts that double."""
    return -float(np.polyfit(np.arange(len(errors)), np.log2(errors), 1)[0])


def _off_one(orders: Sequence[float]) -> float:
    return max(abs(order - 1) for order in orders)


def _flat(law: Moments) -> Tensor:
    return torch.cat([law.mean.flatten(), law.covariance.flatten()])


def _l1(difference: Tensor, nodes: Tensor) -> float:
    return float(torch.trapezoid(difference.abs(), nodes))


def _relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


def _t(values: Sequence) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
