"""Every way to sample a preference on a toy, by name: what sweeps, figures and targets compare."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dbtheory import MeanBlend, PrecisionBlend, Preference, SampledBlend, sample
from dbtheory.blend import Blender
from dbtheory.correct import FeynmanKac, Trace
from dbtheory.experts import Experts
from dbtheory.interpolate import InterpolatedBlend
from dbtheory.kernels import exact_kernels
from dbtheory.sampler import time_grid
from toys.problem import Budget, Problem
from toys.soup import SOUP, NetworkExperts

EXACT = "combined"
Order = Literal["quadratic", "piecewise"]


@dataclass(frozen=True)
class Method:
    """`draw(problem, budget)` gives samples `(n, d)`; ValueError where the method cannot serve the preference."""

    label: str
    draw: Callable[[Problem, Budget], Tensor]


def draw(name: str, problem: Problem, budget: Budget) -> Tensor:
    """Samples `(budget.samples, d)` by the method of that name.

    Raises ValueError for an unknown name, and where the method cannot serve the preference: sampled experts where
    a coefficient is negative, piecewise interpolation off the edges, precisions that are no kernel, exact kernels
    of a law that is no mixture, a soup without networks.
    """
    if name not in METHODS:
        raise ValueError(f"no method named {name!r}; choose among {', '.join(METHODS)}")
    return METHODS[name].draw(problem, budget)


def run(
    experts: Experts,
    blender: Blender,
    budget: Budget,
    method: str = "euler",
    correct: FeynmanKac | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """The budget's samples; the steps crowd towards the data, where the score changes fastest."""
    grid = time_grid(experts.schedule, budget.steps, power=2.0)
    noise = torch.Generator().manual_seed(budget.seed + 1)
    return sample(
        experts,
        blender,
        budget.samples,
        budget.steps,
        noise,
        method=method,
        grid=grid,
        correct=correct,
        trace=trace,
    )


def _exact(problem: Problem, budget: Budget) -> Tensor:
    experts = problem.experts({EXACT: problem.combined})
    return run(experts, MeanBlend(Preference({EXACT: 1.0})), budget)


def _mean(problem: Problem, budget: Budget) -> Tensor:
    return run(problem.experts(), MeanBlend(problem.preference), budget)


def _corrected(problem: Problem, budget: Budget) -> Tensor:
    return run(problem.experts(), MeanBlend(problem.preference), budget, correct=FeynmanKac())


def _sampled(order: str) -> Callable[[Problem, Budget], Tensor]:
    return lambda problem, budget: run(problem.experts(), SampledBlend(problem.preference, order=order), budget)


def _interpolated(order: Order, correct: FeynmanKac | None = None) -> Callable[[Problem, Budget], Tensor]:
    def draws(problem: Problem, budget: Budget) -> Tensor:
        blender = InterpolatedBlend(problem.preference, problem.midpoints, order)
        return run(problem.midpoint_experts(), blender, budget, correct=correct)

    return draws


def _precision(problem: Problem, budget: Budget) -> Tensor:
    experts = problem.experts()
    blender = PrecisionBlend(problem.preference, exact_kernels(experts))
    return run(experts, blender, budget, method="ddpm")


def _network_blend(problem: Problem, budget: Budget) -> Tensor:
    return run(_networks(problem), MeanBlend(problem.preference), budget)


def _soup(problem: Problem, budget: Budget) -> Tensor:
    soup = _networks(problem).soup(problem.preference.coefficients())
    return run(soup, MeanBlend(Preference({SOUP: 1.0})), budget)


def _networks(problem: Problem) -> NetworkExperts:
    if problem.networks is None:
        raise ValueError("a soup needs networks: see toys.soup.train_experts")
    return problem.networks


METHODS: dict[str, Method] = {
    "exact": Method("exact drift", _exact),
    "db": Method("DB-MPA or DB-KLA", _mean),
    "ls": Method("DB-MPA-LS", _sampled("low-discrepancy")),
    "ls-iid": Method("DB-MPA-LS iid", _sampled("iid")),
    "msdda": Method("MSDDA, exact kernels", _precision),
    "piecewise": Method("piecewise interpolation", _interpolated("piecewise")),
    "quadratic": Method("quadratic interpolation", _interpolated("quadratic")),
    "corrected": Method("corrected (Feynman-Kac)", _corrected),
    "corrected-quadratic": Method("corrected quadratic", _interpolated("quadratic", FeynmanKac())),
    "network-db": Method("DB of networks", _network_blend),
    "soup": Method("soup of networks", _soup),
}


def draw_all(
    problem: Problem, names: Sequence[str], budget: Budget, tick: Callable[[], object] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Samples by method, and why the others refused; `tick` is called once a method."""
    draws, refused = {}, {}
    for name in names:
        try:
            draws[name] = draw(name, problem, budget)
        except ValueError as error:
            refused[name] = str(error)
        if tick is not None:
            tick()
    return draws, refused


@dataclass(frozen=True)
class Judgement:
    """Sliced W2 to the exact target by method, "floor" among them; None where a method refused, and why."""

    errors: dict[str, float | None]
    refused: dict[str, str]


def judge(
    problem: Problem, names: Sequence[str], budget: Budget, tick: Callable[[], object] | None = None
) -> Judgement:
    """Draw by each method, as `draw_all`, and measure."""
    draws, refused = draw_all(problem, names, budget, tick)
    distances = problem.distances(draws, budget)
    return Judgement({name: distances.get(name) for name in ("floor", *names)}, refused)
