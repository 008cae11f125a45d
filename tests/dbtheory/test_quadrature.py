"""The two rules for normal expectations: exact moments, jumps, sizes."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from dbtheory.quadrature import gauss_hermite, lattice

LIKE = torch.zeros(1).double()


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_gauss_hermite_integrates_polynomials(dim: int) -> None:
    """Moments of the standard normal up to degree 2 order - 1 in each coordinate: E[z^2k] = (2k - 1)!!."""
    points, log_weights = gauss_hermite(5, dim, LIKE)
    weights = log_weights.exp()
    assert points.shape == (5**dim, dim)
    for degree, moment in enumerate((1, 0, 1, 0, 3, 0, 15, 0, 105, 0)):
        assert (weights @ points[:, -1] ** degree).item() == pytest.approx(moment, abs=1e-11)
    assert (weights @ points.square().prod(1)).item() == pytest.approx(1, abs=1e-12)
    assert abs((weights @ points[:, -1] ** 10).item() - 945) > 1  # negative control: degree 10 is one too many


@pytest.mark.parametrize("rule", [gauss_hermite, lattice])
@pytest.mark.parametrize("order", [40, 400])
def test_characteristic_function(rule: Callable, order: int) -> None:
    """E[cos(3 z)] = e^-4.5 by both rules, at an order where weights underflow too."""
    points, log_weights = rule(order, 1, LIKE)
    assert (log_weights.exp() @ (3 * points[:, 0]).cos()).item() == pytest.approx(math.exp(-4.5), abs=1e-13)


@pytest.mark.parametrize("edge", [-1.3, 0.4, 2.0])
def test_lattice_converges_at_a_jump(edge: float) -> None:
    """P(z > edge): the error is at most the quarter of a cell's mass that doubling moves, and doubling keeps nodes."""
    exact = float(torch.special.ndtr(torch.tensor(-edge, dtype=torch.float64)))
    values, lines = [], []
    for order in (128, 256, 512, 1024):
        points, log_weights = lattice(order, 1, LIKE)
        values.append(float(log_weights.exp() @ (points[:, 0] > edge).double()))
        lines.append(points[:, 0])
        assert abs(values[-1] - exact) < 17 / order * 0.4
    assert torch.equal(lines[1][::2], lines[0])
    for coarse, fine in pairwise(values):
        assert abs(fine - exact) <= 1.05 * abs(fine - coarse)


@pytest.mark.parametrize(("rule", "order", "dim"), [(gauss_hermite, 0, 1), (lattice, 1, 1), (lattice, 2000, 2)])
def test_impossible_sizes_are_refused(rule: Callable, order: int, dim: int) -> None:
    """Too few nodes, or more than a million: the message says what to do."""
    with pytest.raises(ValueError, match=r"directions"):
        rule(order, dim, LIKE)
