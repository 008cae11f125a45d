"""Which expert is drawn: exact laws, proportions in every prefix, for laws that differ by sample and by step."""

import math

import pytest
import torch

from dbtheory.assignment import changing_rotation_choice, independent_choice, rotation_choice
from tests.chance import alarms, law_p_value

N = 100_000
LAWS = [
    (0.3, 0.7),
    (1 / math.pi, 1 - 1 / math.pi),
    (0.5, 0.3, 0.2),
    (1 / math.e, 1 / math.pi, 1 - 1 / math.e - 1 / math.pi),
    (0.1, 0.2, 0.3, 0.4),
    (0.02, 0.9, 0.05, 0.03),
]
CHOICES = {"iid": independent_choice, "low-discrepancy": rotation_choice}
STEPS = 60


def phases(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensor(law):
    return torch.tensor(law, dtype=torch.float64)


def changing(count):
    """Laws (60, 1, count) that swing from each expert to each other; expert 0 has no weight for a third of them."""
    k = torch.arange(STEPS, dtype=torch.float64)[:, None]
    raw = torch.sin(k / 7 + torch.arange(count)).square() + 0.02
    raw[20:40, 0] = 0
    return (raw / raw.sum(1, keepdim=True)).unsqueeze(1)


def proportion_bounds(law):
    """How far a count may be from its expectation: an expert errs by 1 and by its share of what was left to it."""
    first = law[:-1]
    left, remaining, bounds = 0.0, 1.0, []
    for p in first:
        share = p / remaining
        bounds.append(1 + share * left)
        left = 1 + (1 - share) * left
        remaining -= p
    return [*bounds, left]


@pytest.mark.parametrize("order", CHOICES)
def test_each_step_has_the_exact_law(order):
    """At every step each expert is drawn with its coefficient: chi-square, 1e-5 over laws and steps."""
    draws = [(law, CHOICES[order](law, index, phases(N))) for law in LAWS for index in (0, 1, 2, 7, 49, 999)]
    assert not alarms([law_p_value(draw, law) for law, draw in draws])


@pytest.mark.parametrize("order", CHOICES)
def test_wrong_probabilities_are_caught(order):
    """Negative control: the same test alarms where each law is off by 0.01."""
    for law in LAWS:
        wrong = (law[0] + 0.01, *law[1:-1], law[-1] - 0.01)
        assert alarms([law_p_value(CHOICES[order](law, index, phases(N)), wrong) for index in (0, 1, 7)])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_changing_laws_are_exact_at_each_step(count):
    """Where the law changes from step to step each draw keeps the law of its own step; the mean law alarms."""
    laws = changing(count)
    steps = (0, 1, 2, 7, 15, 45, 59)
    draws = [changing_rotation_choice(laws[: k + 1], phases(N)) for k in steps]
    assert not alarms([law_p_value(draw, laws[k, 0].tolist()) for k, draw in zip(steps, draws, strict=True)])
    assert alarms([law_p_value(draw, laws.mean(0)[0].tolist()) for draw in draws])
    without = [changing_rotation_choice(laws[: k + 1], phases(N)) for k in (20, 30, 39)]
    assert not any(bool((draw == 0).any()) for draw in without)


def test_one_phase_drawn_for_the_batch_is_caught():
    """Negative control: one draw shared by a batch has not the law of per-sample draws."""
    shared = rotation_choice((0.3, 0.7), 3, phases(1).expand(N))
    assert alarms([law_p_value(shared, (0.3, 0.7))])


def test_iid_steps_are_independent():
    """With order "iid" successive draws are independent: chi-square on pairs. The rotation's are not."""
    law = (0.3, 0.7)
    pairs = [p * q for p in law for q in law]

    def p_value(choice, index):
        return law_p_value(2 * choice(law, index, phases(N)) + choice(law, index + 1, phases(N)), pairs)

    assert not alarms([p_value(independent_choice, index) for index in range(5)])
    assert alarms([p_value(rotation_choice, 0)])


@pytest.mark.parametrize("law", LAWS)
def test_every_prefix_holds_each_expert_in_proportion(law):
    """After k steps each count is near k w: within 1 for two experts, within the nested bound for m. iid is not."""
    steps, n = 200, 500
    k = torch.arange(1, steps + 1, dtype=torch.float64)[:, None]

    def worst(choice):
        draws = torch.stack([choice(law, index, phases(n)) for index in range(steps)])
        return [float(((draws == i).cumsum(0) - k * w).abs().max()) for i, w in enumerate(law)]

    bounds = proportion_bounds(law)
    assert bounds[:2] == pytest.approx([1.0, 1.0 if len(law) == 2 else 1 + law[1] / (1 - law[0])])
    assert all(error <= bound + 1e-9 for error, bound in zip(worst(rotation_choice), bounds, strict=True))
    assert any(error > bound for error, bound in zip(worst(independent_choice), bounds, strict=True))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_prefix_of_changing_laws_is_in_proportion(count):
    """Counts stay within 1 of the summed weights for two experts; for more, within 1 plus what nesting adds.

    What is left to a level errs by e, and is weighted by conditional shares q that change: by partial summation the
    level errs by at most 1 + e (max q + the variation of q), and leaves what the shares 1 - q would take.
    """
    laws = changing(count)
    draws = torch.stack([changing_rotation_choice(laws[: k + 1], phases(500)) for k in range(STEPS)])
    counts = torch.stack([(draws == i).cumsum(0) for i in range(count)], -1)
    errors = (counts - laws.cumsum(0)).abs().amax((0, 1))
    left = 0.0
    for i in range(count - 1):
        share = laws[:, 0, i] / laws[:, 0, i:].sum(-1)
        variation = float(share.diff().abs().sum())
        assert float(errors[i]) <= 1 + left * (float(share.max()) + variation) + 1e-9
        left = 1 + left * (float((1 - share).max()) + variation)
    assert float(errors[-1]) <= left + 1e-9


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("index", [0, 1, 17, 150])
def test_laws_by_sample_and_by_step_agree_with_one_law(law, index):
    """The same law given as numbers, as (m,), once a sample, or once a step makes the same draws."""
    phase = phases(2000)
    for choice in CHOICES.values():
        drawn = choice(law, index, phase)
        assert torch.equal(choice(tensor(law), index, phase), drawn)
        assert torch.equal(choice(tensor(law).expand(1, -1), index, phase), drawn)
        assert torch.equal(choice(tensor(law).expand(2000, -1), index, phase), drawn)
    by_step = changing_rotation_choice(tensor(law).expand(index + 1, 1, -1), phase)
    # sums of weights round differently from products: a draw may differ where a jump hits the phase
    assert int((by_step != rotation_choice(law, index, phase)).sum()) <= 1


def test_each_sample_follows_its_own_law():
    """Given one law a sample, each draws what it would draw alone, and laws with zeros never draw them."""
    phase, laws = phases(60), torch.cat([changing(3)[:, 0], tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])])
    laws = laws[torch.arange(60) % len(laws)]
    for choice in CHOICES.values():
        together = torch.stack([choice(laws, index, phase) for index in range(20)])
        alone = [[choice(laws[i], index, phase[i : i + 1]).item() for i in range(60)] for index in range(20)]
        assert together.tolist() == alone
        assert bool((laws.expand(20, -1, -1).gather(2, together.unsqueeze(-1)) > 0).all())
    moving = changing(3)[:, 0].expand(60, -1, -1).transpose(0, 1) * torch.linspace(0.2, 1, 60)[None, :, None]
    moving = torch.cat([moving[..., :2], 1 - moving[..., :2].sum(-1, keepdim=True)], -1)
    alone = [changing_rotation_choice(moving[:, i : i + 1], phase[i : i + 1]).item() for i in range(60)]
    assert changing_rotation_choice(moving, phase).tolist() == alone


def test_experts_of_no_probability_take_no_part():
    """Beside samples that use an expert, one that does not draws as if there were no such expert: batches may mix."""
    phase = phases(200)
    for law, used in (((0.0, 0.3, 0.7), (1, 2)), ((0.3, 0.0, 0.7), (0, 2)), ((0.3, 0.7, 0.0), (0, 1))):
        for choice in CHOICES.values():
            for index in range(20):
                alone = choice([law[i] for i in used], index, phase)
                assert torch.equal(choice(law, index, phase), torch.tensor(used)[alone])


def test_draws_do_not_depend_on_the_default_dtype():
    """The rotation counts in float64 (it once counted in the default dtype, and rounded k w to float32)."""
    law, drawn = (0.02, 0.9, 0.05, 0.03), {}
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            drawn[dtype] = torch.stack([rotation_choice(law, index, phases(20_000)) for index in range(100, 200)])
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*drawn.values())
