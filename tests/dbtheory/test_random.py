"""The hash behind every random choice: uniform, independent over samples and counters, blind to batches."""

import struct
from itertools import pairwise

import pytest
import torch
from scipy import stats

from dbtheory.random import uniform
from tests.chance import alarms, law_p_value

N = 200_000
SALTS = (-3, -2, -1, 0, 1, 2, 3, 1000)
MASK = 2**64 - 1


def bad_hash(phase, salt):
    """The negative control: a linear rotation, uniform in itself, whose successive values are dependent."""
    return (phase + 0.001 * salt) % 1.0


def phases(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "random":
        return torch.rand(N, generator=generator, dtype=torch.float64)
    # evenly spaced phases share almost all of their bits: the hard case for a hash
    return torch.arange(N, dtype=torch.float64) / N


def bin_p_value(u):
    return law_p_value((u * 64).long(), [1 / 64] * 64)


def pair_p_value(u, v):
    """Chi-square over an 8 x 8 table: uniform pairs, hence independence."""
    return law_p_value((u * 8).long() * 8 + (v * 8).long(), [1 / 64] * 64)


def reference(phase, salt):
    """splitmix64 in Python's unbounded integers."""

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    (bits,) = struct.unpack("<Q", struct.pack("<d", phase))
    return (mix((mix(bits) + salt * 0x9E3779B97F4A7C15) & MASK) >> 11) * 2.0**-53


@pytest.mark.parametrize("salt", [-(2**40), -2, 0, 1, 7, 2**63])
def test_equals_splitmix64_on_unbounded_integers(salt):
    """torch's wrap-around int64 arithmetic is splitmix64's uint64 arithmetic, bit for bit."""
    phase = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert uniform(phase, salt).tolist() == [reference(p, salt) for p in phase.tolist()]


@pytest.mark.parametrize("kind", ["random", "even"])
def test_uniform_over_samples(kind):
    """At every salt the values are uniform: chi-square over 64 bins, and Kolmogorov-Smirnov."""
    values = [uniform(phases(kind), salt) for salt in SALTS]
    assert all(float(u.min()) >= 0 and float(u.max()) < 1 for u in values)
    ks = [float(stats.kstest(u.numpy(), "uniform").pvalue) for u in values]
    assert not alarms([bin_p_value(u) for u in values] + ks)


@pytest.mark.parametrize("kind", ["random", "even"])
def test_independent_over_salts_samples_and_phase(kind):
    """Pairs over salts, neighbours in a batch, and pairs with the phase itself are uniform on the square."""
    phase = phases(kind)
    values = [uniform(phase, salt) for salt in SALTS]
    over_salts = [pair_p_value(u, v) for u, v in pairwise(values)]
    over_samples = [pair_p_value(u[0::2], u[1::2]) for u in values]
    with_phase = [pair_p_value(phase, u) for u in values]
    assert not alarms(over_salts + over_samples + with_phase)


def test_serial_correlation_of_one_sample():
    """One sample's values over the counter are uniform and serially uncorrelated at lags 1 to 5."""
    phase = torch.tensor([0.3], dtype=torch.float64)
    u = torch.cat([uniform(phase, salt) for salt in range(1, 20_001)])
    z = [float(((u[:-lag] - 0.5) * (u[lag:] - 0.5)).mean()) * 12 * len(u) ** 0.5 for lag in range(1, 6)]
    assert not alarms([bin_p_value(u)] + [float(2 * stats.norm.sf(abs(value))) for value in z])


def test_a_bad_hash_is_caught():
    """Negative control: the same tests raise the alarm for a hash that is uniform but dependent."""
    u, v = (bad_hash(phases("random"), salt) for salt in (1, 2))
    assert not alarms([bin_p_value(u)])
    assert alarms([pair_p_value(u, v)])
    path = torch.cat([bad_hash(torch.tensor([0.3], dtype=torch.float64), salt) for salt in range(1, 20_001)])
    assert alarms([float(2 * stats.norm.sf(abs(float(((path[:-1] - 0.5) * (path[1:] - 0.5)).mean())) * 12 * 141))])


def test_blind_to_batches():
    """A value depends on its own phase and salt alone, wherever it stands in a batch."""
    phase = phases("random")[:1000]
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(2))
    assert torch.equal(uniform(phase[order], 5), uniform(phase, 5)[order])
    assert torch.equal(torch.cat([uniform(part, 5) for part in phase.split(7)]), uniform(phase, 5))
    assert torch.equal(uniform(phase.reshape(500, 2).T[0], 5), uniform(phase, 5)[0::2])
