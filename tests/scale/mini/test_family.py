"""The family: what each member is trained on, and that comparisons are fair."""

from dataclasses import replace

import pytest

from scale.mini.family import FAMILY, SCALES, SINGLE
from scale.rewards import SCORERS, load_scorer
from scale.rewards.expression import parse_reward
from scale.rewards.protocol import Mix
from scale.train.settings import MINI


def test_every_reward_of_the_world_has_an_expert() -> None:
    """The single-reward experts are those of all rewards that ship."""
    assert set(SINGLE) == set(SCALES) == set(SCORERS)


@pytest.mark.parametrize("name", FAMILY)
def test_weights_are_a_preference(name: str) -> None:
    """They are positive and sum to one, and the percents of the name say them, or lambda."""
    expert = FAMILY[name]
    assert all(weight > 0 for weight in expert.weights.values())
    assert sum(expert.weights.values()) == pytest.approx(1)
    said = [int(digits) for part in name.split("-") if (digits := "".join(filter(str.isdigit, part)))]
    if "lambda" in name:
        assert [100 * expert.kl_scale] == pytest.approx(said)
    elif said:
        assert [100 * weight for weight in expert.weights.values()] == pytest.approx(said)


@pytest.mark.parametrize("name", FAMILY)
def test_the_expression_is_the_weighted_sum(name: str) -> None:
    """Parsed, it has each reward with its weight times its scale; symmetry then spans what alignment does."""
    reward = parse_reward(FAMILY[name].reward)
    terms = reward.terms if isinstance(reward, Mix) else ((1.0, reward),)
    expected = {reward: weight * SCALES[reward] for reward, weight in FAMILY[name].weights.items()}
    assert {scorer.name: weight for weight, scorer in terms} == pytest.approx(expected)
    assert (SCALES["symmetry"] * load_scorer("symmetry")).range == load_scorer("alignment").range


@pytest.mark.parametrize("name", FAMILY)
def test_only_alpha_differs(name: str) -> None:
    """Seeds, prompts and budget are one for all, so that MORL is a fair oracle; alpha is divided by lambda."""
    settings = FAMILY[name].settings()
    assert settings.alpha * FAMILY[name].kl_scale == pytest.approx(MINI.alpha)
    assert replace(settings, alpha=MINI.alpha) == MINI
