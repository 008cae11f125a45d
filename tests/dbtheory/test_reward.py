"""Rewards and their arithmetic."""

import math

import pytest
import torch

from dbtheory.reward import FunctionReward, LinearReward, QuadraticReward
from tests.dbtheory.strategies import normal, random_reward


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_quadratic_reward_is_its_formula() -> None:
    """-1/2 x'Qx + b'x + c at points with any leading axes, with no axis at all too."""
    reward = QuadraticReward(torch.tensor([[2.0, 1.0], [1.0, -1.0]]), torch.tensor([1.0, 3.0]), 0.5)
    assert reward(torch.tensor([2.0, -1.0])).item() == -0.5 * (8 - 4 - 1) + 2 - 3 + 0.5
    assert reward(torch.zeros(4, 3, 2)).shape == (4, 3)


def test_gradient_equals_autograd() -> None:
    """`b - Qx` against autograd of the values."""
    reward, x = random_reward(3, 1.0, seeded(0)), normal((7, 3), seeded(1)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(x).sum(), x)
    torch.testing.assert_close(reward.gradient(x), gradient)


def test_sums_and_multiples_of_quadratics_stay_quadratic() -> None:
    """Their tilts stay Gaussian mixtures; the values are the sums and multiples."""
    r1, r2, x = (
        random_reward(2, 1.0, seeded(0)),
        LinearReward(torch.ones(2).double(), 2),
        normal((7, 2), seeded(1)),
    )
    for blend in (0.3 * r1 + 0.7 * r2, r1 * 0.3 + r2 * 0.7, sum([0.3 * r1, 0.7 * r2])):
        assert isinstance(blend, QuadraticReward)
        torch.testing.assert_close(blend(x), 0.3 * r1(x) + 0.7 * r2(x))


def test_other_rewards_add_and_scale() -> None:
    """Any callable joins in, from either side."""
    quadratic, sine, x = (
        random_reward(2, 1.0, seeded(0)),
        FunctionReward(lambda x: x.sin().sum(-1)),
        normal((7, 2), seeded(1)),
    )
    expected = quadratic(x) + 2 * x.sin().sum(-1)
    torch.testing.assert_close((quadratic + 2 * sine)(x), expected)
    torch.testing.assert_close((sine * 2 + quadratic)(x), expected)


def test_to_changes_dtype() -> None:
    """Parameters follow the tensor given."""
    assert random_reward(2, 1.0, seeded(0)).to(torch.zeros(1)).Q.dtype == torch.float32


B = torch.zeros(2).double()


@pytest.mark.parametrize(
    ("Q", "b", "c", "message"),
    [
        (torch.eye(3).double(), B, 0.0, "must be"),
        (torch.eye(2).double(), B[None], 0.0, "must be"),
        (torch.eye(2).double() * math.nan, B, 0.0, "finite"),
        (torch.eye(2).double(), B, math.inf, "finite"),
        (torch.eye(2).double(), B, B, "one number"),
        (torch.tensor([[1.0, 1.0], [0.0, 1.0]]).double(), B, 0.0, "symmetric"),
    ],
)
def test_impossible_rewards_are_refused(Q, b, c, message: str) -> None:
    """Each error says what was wrong with which part."""
    with pytest.raises(ValueError, match=message):
        QuadraticReward(Q, b, c)


def test_dimensions_must_agree() -> None:
    """Sums of rewards of other dimensions, points of another dimension, a matrix as a slope."""
    with pytest.raises(ValueError, match="different dimensions"):
        LinearReward(B) + LinearReward(torch.zeros(3).double())
    with pytest.raises(ValueError, match="points must be"):
        LinearReward(B)(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="sum over the last axis"):
        FunctionReward(torch.sin)(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="b must be"):
        LinearReward(torch.zeros(2, 2))
