"""Interpolation on the preference simplex: exact polynomials, nodes bit for bit, any preference, bad input."""

from collections.abc import Callable, Sequence
from itertools import combinations

import pytest
import torch
from torch import Tensor

from dbtheory import ExactExperts, LinearReward, MeanBlend, Preference
from dbtheory.blend import AffineBlender, Step, weighted_sum
from dbtheory.interpolate import InterpolatedBlend
from dbtheory.parametrization import Parametrization
from tests.dbtheory.strategies import SCHEDULES, normal, random_mixture, random_reward

NAMES = ("r0", "r1", "r2")
EDGES: dict[tuple[str, str], str] = {edge: "+".join(edge) for edge in combinations(("base", *NAMES), 2)}
ORDERS = ("quadratic", "piecewise")
N = 6


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def step(index: int = 0, count: int = 5, n: int = N) -> Step:
    return Step(index, count, 0.4, 0.3, torch.zeros(n, dtype=torch.float64))


def cloud() -> Tensor:
    return normal((N, 2), seeded(3))


def experts(edges: dict[tuple[str, str], str] = EDGES) -> ExactExperts:
    ends = {"base": 0 * random_reward(2, 1.0, seeded(0))}
    ends |= {name: random_reward(2, 1.0, seeded(i)) for i, name in enumerate(NAMES)}
    middle = {name: 0.5 * ends[i] + 0.5 * ends[j] for (i, j), name in edges.items()}
    rewards = {name: reward for name, reward in (ends | middle).items() if name != "base"}
    return ExactExperts(random_mixture(3, 2, seeded(9)), rewards, 1.0, SCHEDULES[0])


class Polynomials:
    """Experts whose prediction is a given function of their place on the simplex, at every x."""

    schedule, event_shape = SCHEDULES[0], (2,)
    parametrization: Parametrization = "score"
    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        corners: dict[str, Tensor] = dict(zip(("base", *NAMES), torch.eye(4, dtype=torch.float64), strict=True))
        middle = {name: 0.5 * (corners[i] + corners[j]) for (i, j), name in EDGES.items()}
        self.values = {name: function(place) for name, place in (corners | middle).items()}
        self.names = tuple(self.values)

    def predict(self, x: Tensor, t: Tensor | float, names: Sequence[str]) -> Tensor:
        return torch.stack([self.values[name].expand_as(x) for name in names])

    def predict_each(self, x: Tensor, t: Tensor | float, assignment: Tensor) -> Tensor:
        raise NotImplementedError("interpolation evaluates whole batches")


def place(preference: Preference) -> Tensor:
    return torch.tensor([float(c) for c in preference.coefficients().values()], dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.4, 1.0, 1.9])
@pytest.mark.parametrize("weights", [(0.2, 0.5, 0.3), (0.7, 0.3, 0.0), (1.3, 0.2, -0.5)])
def test_quadratic_is_exact_for_every_quadratic(weights: tuple[float, ...], scale: float) -> None:
    """Lagrange's P2 on the full simplex of three rewards and the base: every quadratic polynomial of the
    coefficients is reproduced, inside and outside it, and a cubic is not."""
    matrix, slope = normal((4, 4), seeded(1)), normal((4,), seeded(2))
    preference = Preference(dict(zip(NAMES, weights, strict=True)), scale, allow_negative=True)
    blend = InterpolatedBlend(preference, EDGES)

    def polynomial(c: Tensor) -> Tensor:
        return c @ matrix @ c + slope @ c + 1.0

    def cubic(c: Tensor) -> Tensor:
        return (slope @ c) ** 3

    for function, exact in ((polynomial, True), (cubic, False)):
        blended = blend(Polynomials(function), torch.zeros(N, 2).double(), 0.4, step())
        assert torch.allclose(blended, function(place(preference)).expand(N, 2), rtol=1e-12, atol=1e-12) is exact


def test_the_shape_functions_of_lagrange() -> None:
    """The hierarchical form's coefficients are `c_i (2 c_i - 1)` at vertices and `4 c_i c_j` at midpoints."""
    preference = Preference({"r0": 0.5, "r1": 0.3, "r2": 0.2}, 0.8)
    c = preference.coefficients()
    shares = InterpolatedBlend(preference, EDGES).coefficients(step())
    for name, value in c.items():
        assert shares[name] == pytest.approx(value * (2 * value - 1), abs=1e-15)
    for (i, j), name in EDGES.items():
        assert shares[name] == pytest.approx(4 * c[i] * c[j], abs=1e-15)
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize(("s", "expected"), [(0.1, (0.8, 0.2, 0)), (0.7, (0, 0.6, 0.4)), (1.5, (0, -1, 2))])
def test_piecewise_linear_on_an_edge(s: float, expected: tuple[float, float, float]) -> None:
    """The hat functions of the nodes 0, 1/2, 1; beyond the end the last half is extrapolated."""
    along_lambda = InterpolatedBlend(Preference({"r0": 1, "r1": 0, "r2": 0}, s), EDGES, "piecewise")
    in_w = Preference({"r0": 1 - s, "r1": s, "r2": 0}, allow_negative=True)
    for blend, nodes in (
        (along_lambda, ("base", "base+r0", "r0")),
        (InterpolatedBlend(in_w, EDGES, "piecewise"), ("r0", "r0+r1", "r1")),
    ):
        shares = blend.coefficients(step())
        assert [shares[name] for name in nodes] == pytest.approx(expected, abs=1e-15)
        assert all(share == 0 for name, share in shares.items() if name not in nodes)


@pytest.mark.parametrize("order", ORDERS)
def test_nodes_are_the_experts_themselves(order: str) -> None:
    """At a vertex or a midpoint the blend is that expert, bit for bit: nothing else is evaluated."""
    here, x = experts(), cloud()
    nodes = {name: Preference({n: float(n == name) for n in NAMES}) for name in NAMES}
    nodes |= {f"base+{name}": Preference({n: float(n == name) for n in NAMES}, 0.5) for name in NAMES}
    nodes |= {"+".join(pair): Preference({n: 0.5 * (n in pair) for n in NAMES}) for pair in combinations(NAMES, 2)}
    nodes["base"] = Preference({"r0": 0.3, "r1": 0.7, "r2": 0.0}, 0)
    for name, preference in nodes.items():
        blended = InterpolatedBlend(preference, EDGES, order)(here, x, 0.4, step())
        assert torch.equal(blended, here.predict(x, 0.4, [name])[0])


@pytest.mark.parametrize("order", ORDERS)
def test_edges_without_midpoints_are_linear(order: str) -> None:
    """Without a midpoint on the edge in use the blend is MeanBlend's."""
    preference, x = Preference({"r0": 0.3, "r1": 0.7, "r2": 0}), cloud()
    edges = {("base", "r2"): "base+r2"}
    shares = InterpolatedBlend(preference, edges, order).coefficients(step())
    assert shares == {**preference.coefficients(), "base+r2": 0.0}
    expected = MeanBlend(preference)(experts({}), x, 0.4, step())
    assert torch.equal(InterpolatedBlend(preference, edges, order)(experts(edges), x, 0.4, step()), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_one_preference_a_sample_and_functions_of_progress(order: str) -> None:
    """Each row is blended as its own preference alone would be, and each step as the preference in force there."""
    here, x = experts(), cloud()
    scales = torch.tensor([0.0, 0.3, 0.5, 0.8, 1.0, 1.7], dtype=torch.float64)
    weights = {"r0": 1.0, "r1": 0.0, "r2": 0.0}
    together = InterpolatedBlend(Preference(weights, scales), EDGES, order)(here, x, 0.4, step())
    for i, scale in enumerate(scales.tolist()):
        alone = InterpolatedBlend(Preference(weights, scale), EDGES, order)(here, x, 0.4, step())
        torch.testing.assert_close(together[i], alone[i], rtol=1e-13, atol=1e-13)
    moving = InterpolatedBlend(Preference(weights, lambda progress: 0.2 + progress), EDGES, order)
    for index in (0, 2, 4):
        fixed = InterpolatedBlend(Preference(weights, 0.2 + index / 4), EDGES, order)
        assert moving.coefficients(step(index)) == fixed.coefficients(step(index))


def test_rows_on_different_edges() -> None:
    """Piecewise needs one edge a sample, not one edge a batch."""
    rows = torch.tensor([[0.2, 0.8, 0.0], [0.0, 0.3, 0.7]], dtype=torch.float64)
    weights = Preference(dict(zip(NAMES, rows.T, strict=True)))
    shares = InterpolatedBlend(weights, EDGES, "piecewise").coefficients(step(n=2))
    torch.testing.assert_close(shares["r0+r1"], torch.tensor([0.4, 0.0], dtype=torch.float64))
    torch.testing.assert_close(shares["r1+r2"], torch.tensor([0.0, 0.6], dtype=torch.float64))


@pytest.mark.parametrize("order", ORDERS)
def test_coefficients_are_the_blend(order: str) -> None:
    """What `coefficients` says is what `__call__` sums: it is an AffineBlender, as Feynman-Kac needs."""
    blend, here, x = InterpolatedBlend(Preference({"r0": 0.3, "r1": 0.7, "r2": 0}), EDGES, order), experts(), cloud()
    assert isinstance(blend, AffineBlender)
    expected = weighted_sum(here, x, 0.4, blend.coefficients(step()))
    assert torch.equal(blend(here, x, 0.4, step()), expected)


HALVES = Preference({"r0": 0.5, "r1": 0.5})


@pytest.mark.parametrize(
    ("midpoints", "said"),
    [
        ({("r0", "r9"): "m"}, r"an edge joins two of .*received \('r0', 'r9'\)"),
        ({("r0", "r0"): "m"}, "an edge joins two"),
        ({("r0", "r1"): "m", ("r1", "r0"): "k"}, "each edge has one midpoint"),
        ({("r0", "r1"): "m", ("base", "r0"): "m"}, "an expert of its own"),
        ({("base", "r0"): "r1"}, "must be other experts than the vertices"),
    ],
)
def test_bad_midpoints(midpoints: dict[tuple[str, str], str], said: str) -> None:
    """Edges that are none, doubled midpoints, and vertices as midpoints are ValueErrors."""
    with pytest.raises(ValueError, match=said):
        InterpolatedBlend(HALVES, midpoints)


def test_bad_orders_experts_and_preferences() -> None:
    """An unknown order, experts that do not match, and piecewise off an edge are ValueErrors with the remedy."""
    with pytest.raises(ValueError, match="order must be one of"):
        InterpolatedBlend(HALVES, {}, "cubic")
    x, halves = cloud(), Preference({"r0": 0.5, "r1": 0.5, "r2": 0})
    with pytest.raises(ValueError, match="no such midpoint experts"):
        InterpolatedBlend(halves, {("r0", "r1"): "nowhere"})(experts(), x, 0.4, step())
    with pytest.raises(ValueError, match="no weight for expert"):
        InterpolatedBlend(halves, {})(experts(), x, 0.4, step())
    inside = Preference({"r0": 0.5, "r1": 0.5, "r2": 0}, 0.9)
    with pytest.raises(ValueError, match=r'3 nonzero coefficients.*use order="quadratic"'):
        InterpolatedBlend(inside, EDGES, "piecewise")(experts(), x, 0.4, step())


def test_linear_rewards_on_a_gaussian_need_no_midpoint() -> None:
    """Where DB is exact, quadratic interpolation is too: one Gaussian and linear rewards (MATH.md 5)."""
    prior, x = random_mixture(1, 2, seeded(0)), cloud()
    slopes = {name: LinearReward(normal((2,), seeded(i))) for i, name in enumerate(("r0", "r1"))}
    exact = 0.3 * slopes["r0"] + 0.7 * slopes["r1"]
    middle = 0.5 * slopes["r0"] + 0.5 * slopes["r1"]
    here = ExactExperts(prior, slopes | {"m": middle}, 0.7, SCHEDULES[0])
    score = ExactExperts(prior, {"exact": exact}, 0.7, SCHEDULES[0]).predict(x, 0.4, ["exact"])[0]
    blended = InterpolatedBlend(Preference({"r0": 0.3, "r1": 0.7}), {("r0", "r1"): "m"})(here, x, 0.4, step())
    torch.testing.assert_close(blended, score, rtol=1e-12, atol=1e-12)
