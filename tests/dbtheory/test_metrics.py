"""Distances against closed forms on Gaussians and translations."""

import math

import ot
import pytest
import torch

from dbtheory import GaussianMixture
from dbtheory.metrics import SlicedW2, gaussian_w2, kl_estimate, sliced_w2, total_variation, w2_1d

D = torch.float64


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=D)


def gaussian(mean, variances):
    return GaussianMixture(
        torch.ones(1, dtype=D),
        torch.tensor([mean], dtype=D),
        torch.diag(torch.tensor(variances, dtype=D))[None],
    )


def test_sliced_w2_of_a_translation():
    """A translation by v moves each projection by `<v, theta>`: sliced W2 is `|v| / sqrt(d)`."""
    x, shift = normal(500, 3), torch.tensor([1.0, -2.0, 0.5], dtype=D)
    expected = float(shift.norm()) / math.sqrt(3)
    assert sliced_w2(x, x + shift, projections=20_000) == pytest.approx(expected, rel=0.02)


def test_sliced_w2_of_scaled_gaussians():
    """Scaling by s moves each quantile q of a projection by `(s - 1) q`: no sampling error."""
    x = normal(20_000, 2)
    expected = float(2.0 * (x**2).mean().sqrt())
    assert sliced_w2(x, 3.0 * x) == pytest.approx(expected, rel=0.02)
    assert sliced_w2(x, x) == pytest.approx(0.0, abs=1e-9)


def test_sliced_w2_is_symmetric_and_seeded():
    """The distance is symmetric, the same for the same seed, and takes samples of different sizes."""
    x, y = normal(400, 2), 0.5 + normal(300, 2, seed=1)
    assert sliced_w2(x, y) == pytest.approx(sliced_w2(y, x), rel=1e-9)
    assert sliced_w2(x, y, seed=1) == sliced_w2(x, y, seed=1) != sliced_w2(x, y, seed=2)
    with pytest.raises(ValueError, match="share their dimension"):
        sliced_w2(x, normal(300, 3))


@pytest.mark.parametrize("size", [400, 1200, 300])
def test_sliced_w2_is_pots(size):
    """All routes, equal sizes, a multiple and neither, are POT's sliced distance along the same directions."""
    x, y = normal(400, 3), 0.5 + normal(size, 3, seed=1)
    directions = torch.randn(3, 50, generator=torch.Generator().manual_seed(4), dtype=D)
    directions = (directions / directions.norm(dim=0)).numpy()
    expected = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=directions, p=2)
    assert sliced_w2(x, y, projections=50, seed=4) == pytest.approx(float(expected), rel=1e-9)
    assert SlicedW2(y, projections=50, seed=4)(x) == sliced_w2(x, y, projections=50, seed=4)


def test_w2_on_the_line():
    """On the line W2 is the distance of sorted samples."""
    x, y = normal(1000, 1)[:, 0], 2 * normal(1000, 1, seed=1)[:, 0] + 1
    expected = float((x.sort().values - y.sort().values).square().mean().sqrt())
    assert w2_1d(x, y) == pytest.approx(expected, rel=1e-9)


def test_gaussian_w2_of_commuting_covariances():
    """For commuting covariances W2^2 is `|m1 - m2|^2 + sum (sqrt(v1) - sqrt(v2))^2`."""
    m1, m2 = torch.zeros(2, dtype=D), torch.tensor([1.0, 2.0], dtype=D)
    v1, v2 = torch.tensor([1.0, 4.0], dtype=D), torch.tensor([9.0, 0.25], dtype=D)
    expected = math.sqrt(5 + 4 + 2.25)
    assert gaussian_w2(m1, v1.diag(), m2, v2.diag()) == pytest.approx(expected, rel=1e-9)


def test_kl_estimate_covers_the_closed_form():
    """The estimate is within 4.5 standard errors (7e-6) of the KL of Gaussians; a wrong KL is not."""
    p, q = gaussian([0.0, 1.0], [1.0, 0.5]), gaussian([0.5, 0.0], [2.0, 1.0])

    def closed(mean, v, w):
        return 0.5 * sum(a / b + m**2 / b - 1 + math.log(b / a) for m, a, b in zip(mean, v, w, strict=True))

    estimate, error = kl_estimate(p, q, 50_000, torch.Generator().manual_seed(0))
    assert abs(estimate - closed([0.5, 1.0], [1.0, 0.5], [2.0, 1.0])) < 4.5 * error
    assert abs(estimate - closed([0.5, 1.0], [2.0, 1.0], [1.0, 0.5])) > 4.5 * error


@pytest.mark.parametrize(("dim", "counts"), [(1, [401]), (2, [201, 161])])
def test_total_variation_of_shifted_gaussians(dim, counts):
    """Shifting N(0, I) by m moves total variation `2 Phi(m/2) - 1`, whatever the dimension; equal laws have 0."""
    m = 1.3
    p, q = gaussian([0.0] * dim, [1.0] * dim), gaussian([m] + [0.0] * (dim - 1), [1.0] * dim)
    box = [-8.0] * dim, [9.0] * dim, counts
    assert total_variation(p, q, *box) == pytest.approx(math.erf(m / 2 / math.sqrt(2)), abs=1e-3)
    assert total_variation(p, p, *box) == 0.0


@pytest.mark.parametrize("box", [([0.0], [1.0, 1.0], [9, 9]), ([1.0], [0.0], [9]), ([0.0], [1.0], [1])])
def test_total_variation_refuses_boxes_that_are_none(box):
    """Axes that disagree, are reversed or have no length are a ValueError that shows the box."""
    p = gaussian([0.0], [1.0])
    with pytest.raises(ValueError, match="low < high"):
        total_variation(p, p, *box)
