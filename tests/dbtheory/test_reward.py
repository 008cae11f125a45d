"""Rewards and their arithmetic."""

import math

import pytest
import torch

from dbtheory.reward import FunctionReward, LinearReward, QuadraticReward, RBFReward, SmoothReward, TanhReward
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


def bumps() -> RBFReward:
    return RBFReward(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([1.0, 0.5]), torch.tensor([1.0, -2.0]))


def test_rbf_reward_is_its_formula() -> None:
    """Bumps at two centres: their values there, and half a width away."""
    far, near = math.exp(-2.5), math.exp(-0.5 * 5 / 0.25)
    values = bumps()(torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.5, 1.0]]))
    third = math.exp(-0.125) - 2 * math.exp(-0.5 * (2.25 + 1) / 0.25)
    torch.testing.assert_close(values, torch.tensor([1 - 2 * near, far - 2, third]))


def test_tanh_reward_is_its_formula() -> None:
    """Two saturating slopes, and the directions on which they depend."""
    reward = TanhReward(torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.tensor([0.0, -1.0]), torch.tensor([3.0, 1.0]))
    assert reward(torch.tensor([0.5, 0.25])).item() == pytest.approx(3 * math.tanh(0.5), rel=1e-6)
    assert reward.directions is not None
    assert reward.directions.shape == (2, 2)


def test_a_small_network_is_a_smooth_reward() -> None:
    """Any module from points to values serves as the function."""
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1), torch.nn.Flatten(0))
    assert SmoothReward(network)(torch.zeros(5, 2)).shape == (5,)


def test_a_function_of_directions_sees_their_coordinates() -> None:
    """With directions (k, d) the function takes x @ directions.T."""
    directions, x = normal((2, 5), seeded(0)), normal((7, 5), seeded(1))
    reward = SmoothReward(lambda z: z[..., 0] * z[..., 1].sin(), directions)
    torch.testing.assert_close(reward(x), (x @ directions[0]) * (x @ directions[1]).sin())


def test_sums_and_multiples_of_smooth_rewards_stay_smooth() -> None:
    """So do sums with quadratic ones; directions add up where both are known, and a plain function ends it."""
    slope, x = normal((1, 3), seeded(0)), normal((7, 3), seeded(1))
    ridge, line = SmoothReward(lambda z: z.squeeze(-1).sin(), slope), LinearReward(normal((3,), seeded(2)))
    free, plain = SmoothReward(lambda x: x.cos().sum(-1)), FunctionReward(lambda x: x.sign().sum(-1))
    for blend in (0.5 * ridge + line * 2, 2 * line + ridge * 0.5, sum([0.5 * ridge, 2 * line])):
        assert isinstance(blend, SmoothReward)
        assert not isinstance(blend, QuadraticReward)
        assert blend.directions is not None
        assert torch.linalg.matrix_rank(blend.directions) == 2
        torch.testing.assert_close(blend(x), 0.5 * (x @ slope[0]).sin() + 2 * x @ line.b)
    assert isinstance(ridge + free, SmoothReward)
    assert (ridge + free).directions is None
    assert not isinstance(ridge + plain, SmoothReward)
    assert not isinstance(plain + line, SmoothReward)


def test_sums_follow_the_dtype_of_the_points() -> None:
    """A sum of float64 rewards takes float32 points, as each of them does through `to`."""
    quadratic, x = random_reward(2, 1.0, seeded(0)), torch.ones(3, 2)
    for other in (bumps(), FunctionReward(lambda x: x.sum(-1))):
        assert (0.5 * (quadratic + other))(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RBFReward(torch.zeros(2, 2), torch.ones(3), torch.ones(2)), "centres, widths"),
        (lambda: RBFReward(torch.zeros(2, 2), torch.zeros(2), torch.ones(2)), "positive"),
        (lambda: TanhReward(torch.zeros(2, 2), torch.zeros(2), torch.ones(3)), "slopes, offsets"),
        (lambda: SmoothReward(torch.sum, torch.zeros(2)), "directions"),
        (lambda: bumps()(torch.zeros(4, 3)), "points must be"),
        (lambda: SmoothReward(lambda z: z.sum(-1), torch.ones(1, 2))(torch.zeros(4, 3)), "points must be"),
        (lambda: SmoothReward(torch.sin)(torch.zeros(4, 3)), "squeeze"),
        (lambda: TanhReward(torch.ones(1, 2), *torch.ones(2, 1)) + LinearReward(torch.ones(3)), "different dimensions"),
    ],
)
def test_impossible_smooth_rewards_are_refused(make, message: str) -> None:
    """Shapes that disagree, widths that are not positive, points and sums of other dimensions."""
    with pytest.raises(ValueError, match=message):
        make()


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


def test_parts_of_different_types_are_promoted():
    """A double Q with a float b (as `torch.tensor([0.5, 0.0])` gives) is one double reward, and moves as one."""
    reward = QuadraticReward(torch.eye(2, dtype=torch.float64), torch.tensor([0.5, 0.0]))
    assert reward.Q.dtype == reward.b.dtype == reward.c.dtype == torch.float64
    moved = reward.to(torch.zeros(1, dtype=torch.float32))
    assert moved.Q.dtype == moved.b.dtype == torch.float32
    assert moved(torch.ones(3, 2)).dtype == torch.float32
