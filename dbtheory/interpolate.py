"""Interpolation of the control on the preference simplex (MATH.md 4).

The control is `u(c) = grad_x K(c)`, with K a cumulant generating function of the rewards, and c the preference's
barycentric coordinates over the vertices {"base", experts}. DB interpolates it linearly from the vertices; one
more expert at the middle of an edge raises the order by one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dbtheory.blend import Step, weighted_sum
from dbtheory.experts import Experts, Points
from dbtheory.preference import BASE, Amount, Preference

ORDERS = ("quadratic", "piecewise")


@dataclass(frozen=True)
class InterpolatedBlend:
    """Piecewise polynomial interpolation from the vertices and from the experts at the middle of edges.

    `midpoints` maps an edge to the expert aligned there: ("r1", "r2") to the expert of reward (r1 + r2)/2,
    ("base", "r1") to that of r1/2, which is r1 with a doubled KL term. With those
    `u(c) = sum_i c_i u_i + sum_ij phi(c_i, c_j) (u_ij - (u_i + u_j)/2)`:
    `phi = 4 c_i c_j` for order "quadratic" (on the whole simplex, Lagrange's P2 for any number of experts, and
    beyond it), `phi = 2 min(c_i, c_j)` for "piecewise" (linear between an edge's three nodes, the half next to
    the preference extrapolated; one edge only). An edge without a midpoint stays linear. At a node the blend
    is that expert, bit for bit. The preference names the vertices alone. Error: `dbtheory.expansion`.

    Raises:
        ValueError: an unknown order; a midpoint whose edge has no two different vertices of the preference, or
            is given twice; a midpoint's expert that is a vertex, or serves two edges; at the call, experts that
            are neither vertices nor midpoints, or are missing; "piecewise" where more than two vertices have a
            coefficient.
    """

    preference: Preference
    midpoints: Mapping[tuple[str, str], str]
    order: str = "quadratic"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, received {self.order!r}")
        vertices = {BASE, *self.preference.names}
        for edge in self.midpoints:
            if len(edge) != 2 or len(set(edge)) != 2 or not vertices.issuperset(edge):
                raise ValueError(f"an edge joins two of {sorted(vertices)}, received {edge}")
        experts = list(self.midpoints.values())
        if len({frozenset(edge) for edge in self.midpoints}) < len(experts) or len(set(experts)) < len(experts):
            raise ValueError(f"each edge has one midpoint and an expert of its own, received {dict(self.midpoints)}")
        if not vertices.isdisjoint(experts):
            raise ValueError(
                f"midpoints must be other experts than the vertices {sorted(vertices)}, received {experts}; "
                "align one model to the mean of an edge's two rewards"
            )

    def __call__(self, experts: Experts, x: Points, t: Tensor | float, step: Step) -> Points:
        middle = set(self.midpoints.values())
        missing = sorted(middle.difference(experts.names))
        if missing:
            raise ValueError(f"no such midpoint experts: {missing}; the experts are {list(experts.names)}")
        self.preference.validate([name for name in experts.names if name not in middle])
        self.preference.require_rows(len(x), step.progress)
        return weighted_sum(experts, x, t, self.coefficients(step))

    def coefficients(self, step: Step) -> dict[str, Amount]:
        """Of every expert, vertices and midpoints: they sum to 1. Tensors `(n,)` with one preference a sample."""
        vertices: dict[str, Amount] = self.preference.coefficients(step.progress)
        if self.order == "piecewise":
            _require_one_edge(vertices)
        shares = dict(vertices)
        for (i, j), middle in self.midpoints.items():
            c_i, c_j = vertices[i], vertices[j]
            phi = 4 * c_i * c_j if self.order == "quadratic" else 2 * _hat(c_i, c_j)
            shares[middle] = phi
            shares[i] = shares[i] - 0.5 * phi
            shares[j] = shares[j] - 0.5 * phi
        return shares


def _hat(c_i: Amount, c_j: Amount) -> Amount:
    """The smaller coefficient on the edge in use, 0 on any other; numbers stay numbers, without rounding."""
    in_use = c_i * c_j != 0
    return in_use * (c_i * (c_i < c_j) + c_j * (c_i >= c_j))


def _require_one_edge(vertices: Mapping[str, Amount]) -> None:
    table = torch.stack(torch.broadcast_tensors(*(torch.as_tensor(c) for c in vertices.values())))
    most = int(table.count_nonzero(0).max())
    if most > 2:
        raise ValueError(
            f"piecewise interpolation runs along one edge, received a preference with {most} nonzero coefficients "
            f'over {list(vertices)}; use order="quadratic"'
        )
