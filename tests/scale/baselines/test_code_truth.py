"""CoDe where its answer is known: the law of best-of-N, and a plain re-simulation of every candidate."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from scale.baselines.candidates import search
from scale.baselines.chain import streams
from scale.baselines.ledger import Ledger
from tests.chance import FALSE_ALARM
from tests.scale.baselines.chains import AffineChain
from tests.scale.train.gaussian import Quadratic, Steps, ancestral, marginals

MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64)
SLOPE = Quadratic(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
BOWL = Quadratic(torch.eye(2, dtype=torch.float64), torch.tensor([1.0, -2.0], dtype=torch.float64))


def test_one_block_is_best_of_n() -> None:
    """4,000 samples of 4 candidates have the CDF F^4, F the model's own (Kolmogorov-Smirnov, level 1e-5).

    F^3, F^5 and F itself would be seen; so would candidates that share their initial noise.
    """
    affine = ancestral(MEAN[:1], 0.5, 5, 0.6)  # its last state still hangs on its first
    mean, covariance = marginals(affine)[-1]
    law = stats.norm(float(mean), float(covariance) ** 0.5)
    x = search(AffineChain(affine), [""] * 4000, range(4000), SLOPE, candidates=4, block=5, max_rows=4000)[:, 0]

    gain = float(affine.matrices.prod())
    z = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shared = float(mean) + gain * z[:, 0] + (float(covariance) - gain**2) ** 0.5 * z[:, 1:].amax(1)

    def p_value(n: int, x: Tensor = x) -> float:
        return float(stats.kstest(x.numpy(), lambda value: law.cdf(value) ** n).pvalue)

    assert p_value(4) > FALSE_ALARM
    for wrong in (1, 3, 5):
        assert p_value(wrong) < FALSE_ALARM
    assert p_value(4, shared) < FALSE_ALARM


def _noise(generator: torch.Generator, count: int) -> list[Tensor]:
    return [torch.randn(2, generator=generator, dtype=torch.float64) for _ in range(count)]


def resimulated(affine: Steps, seed: int, candidates: int, block: int) -> Tensor:
    """One picture, one candidate at a time, with the same noise: each block is run to its end, then judged."""
    noise = [_noise(generator, len(affine) + 1) for generator in streams(seed, candidates)]
    states, k = [own[0] for own in noise], 0
    while k < len(affine):
        end, ends, rewards = min(k + block, len(affine)), [], []
        for own, x in zip(noise, states, strict=True):
            for step in range(k, end):
                x = affine.matrices[step] @ x + affine.shifts[step] + affine.deviations[step] * own[step + 1]
            ends.append(x)
            for step in range(end, len(affine)):
                x = affine.matrices[step] @ x + affine.shifts[step]
            rewards.append(float(BOWL.score(x[None], [""])))
        winner = ends[max(range(candidates), key=rewards.__getitem__)]
        states, k = [winner] * candidates, end
    return states[0]


@pytest.mark.parametrize(("steps", "block"), [(7, 3), (6, 3), (6, 1), (5, 5), (5, 9)])
def test_blocks_are_those_of_a_plain_simulation(steps: int, block: int) -> None:
    """Every picture, with a last block that is shorter or not, whatever `max_rows` cuts the rows into.

    Costs: candidates * steps evaluations, and one score a candidate and block.
    """
    affine, seeds = ancestral(MEAN, 0.5, steps, 0.3), range(6)
    expected = torch.stack([resimulated(affine, seed, 4, block) for seed in seeds])
    for max_rows in (1, 3, 8, 100):
        chain, ledger = AffineChain(affine), Ledger()
        x = search(chain, [""] * 6, seeds, BOWL, candidates=4, block=block, max_rows=max_rows, ledger=ledger)
        torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)
        assert sum(chain.rows) == 6 * 4 * steps
        assert max(chain.rows) <= max_rows
        assert ledger.reward_calls == 6 * 4 * -(-steps // block)


def test_one_candidate_is_the_plain_chain_and_is_not_scored() -> None:
    """With the noise of the picture's own generator; a second candidate's stream is another one."""
    affine, ledger = ancestral(MEAN, 0.5, 4, 0.3), Ledger()
    x = search(AffineChain(affine), [""], [3], BOWL, candidates=1, block=2, max_rows=1, ledger=ledger)[0]
    noise = _noise(torch.Generator().manual_seed(3), 5)
    y = noise[0]
    for k in range(4):
        y = affine.matrices[k] @ y + affine.shifts[k] + affine.deviations[k] * noise[k + 1]
    torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    assert ledger == Ledger()
    first, second, third = (torch.randn(8, generator=generator) for generator in streams(3, 3))
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
