"""Effective sample size and systematic resampling, against their definitions."""

import math

import pytest
import torch

from dbtheory.resampling import effective_size, systematic


def test_systematic_resampling_rounds_the_expected_counts():
    """Each sample is copied `n w` times, rounded down or up, and exactly `n w` times on average over the uniform."""
    log_weights = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = 50 * log_weights.softmax(0)
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    counts = torch.stack([systematic(log_weights, u.reshape(1)).bincount(minlength=50) for u in uniforms])
    assert bool(((counts - expected).abs() < 1).all())
    torch.testing.assert_close(counts.double().mean(0), expected, rtol=0.0, atol=1e-3)
    ancestors = systematic(log_weights, uniforms[:1])
    assert bool((ancestors.diff() >= 0).all())
    for u in (0.0, 0.5, 1 - 1e-16):
        point = torch.tensor([0.0, -800.0, -math.inf], dtype=torch.float64)
        assert systematic(point, torch.tensor([u], dtype=torch.float64)).tolist() == [0, 0, 0]


def test_effective_size():
    """1 for equal weights, 1/n for one survivor, and no overflow far from 1."""
    assert effective_size(torch.full((8,), -900.0, dtype=torch.float64)) == pytest.approx(1.0)
    assert effective_size(torch.tensor([900.0, 0.0, 0.0, 0.0], dtype=torch.float64)) == pytest.approx(0.25)
