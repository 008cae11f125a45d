"""The blenders: exact laws, proportions in every prefix, and no dependence on batches."""

import pytest
import torch

import toys
from dbtheory import ExactExperts, InterpolatedBlend, MeanBlend, PrecisionBlend, Preference, SampledBlend
from dbtheory.blend import Step
from dbtheory.parametrization import convert
from tests.chance import alarms, mean_p_value
from tests.dbtheory.wrapped import Wrapped

N = 100_000
ORDERS = ("iid", "low-discrepancy")

VARIANCES = {"base": 1.0, "east": 0.9, "north": 1.1}


def phases(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ring(kind="score"):
    toy = toys.get("ring-of-six")
    return ExactExperts(toy.prior, toy.rewards, toy.alpha, toy.schedule, kind)


def cloud(n=200):
    return 2 * torch.randn(n, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def step(n, index=0, count=10):
    return Step(index, count, 0.4, 0.3, phases(n))


class Counting(Wrapped):
    """Experts that record which of them were asked."""

    def __init__(self, experts):
        super().__init__(experts)
        self.asked = []

    def predict(self, x, t, names):
        self.asked.append(tuple(names))
        return self.inner.predict(x, t, names)

    def predict_each(self, x, t, assignment):
        self.asked.append(len(assignment))
        return self.inner.predict_each(x, t, assignment)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
def test_mean_blend_is_the_weighted_sum(scale):
    """MeanBlend is `sum_i c_i prediction_i`, base included, for lambda below and above 1."""
    experts, x = ring(), cloud()
    blended = MeanBlend(Preference({"east": 0.3, "north": 0.7}, scale))(experts, x, 0.4, step(200))
    base, east, north = experts.predict(x, 0.4, ["base", "east", "north"])
    expected = (1 - scale) * base + scale * (0.3 * east + 0.7 * north)
    torch.testing.assert_close(blended, expected, rtol=1e-13, atol=1e-13)


def test_one_preference_a_sample_is_each_row_alone():
    """Rows with their own weights and lambda are what each row gets under its preference alone; one-hot bit for bit."""
    experts, x = ring(), cloud(4)
    w, scale = torch.tensor([0.0, 0.3, 1.0, 0.5]), torch.tensor([1.0, 0.5, 1.0, 1.7])
    together = MeanBlend(Preference({"east": w, "north": 1 - w}, scale))(experts, x, 0.4, step(4))
    for i in range(4):
        alone = Preference({"east": float(w[i]), "north": 1 - float(w[i])}, float(scale[i]))
        expected = MeanBlend(alone)(experts, x[i : i + 1], 0.4, step(1))
        torch.testing.assert_close(together[i : i + 1], expected, rtol=1e-6, atol=1e-6)
    _, east, north = experts.predict(x, 0.4, ["base", "east", "north"])
    assert torch.equal(together[0], north[0])
    assert torch.equal(together[2], east[2])
    with pytest.raises(ValueError, match="3 samples, received 4 preferences"):
        MeanBlend(Preference({"east": w, "north": 1 - w}))(experts, x[:3], 0.4, step(3))


@pytest.mark.parametrize(
    "blender", [MeanBlend, SampledBlend, lambda p: PrecisionBlend(p, VARIANCES), lambda p: InterpolatedBlend(p, {})]
)
@pytest.mark.parametrize(
    "weight", [torch.ones(4), torch.full((4,), 0.3), torch.ones(1), lambda s: torch.ones(3 if s == 0 else 4)]
)
def test_as_many_preferences_as_samples(blender, weight):
    """Also where one expert alone is active, and where a function of progress changes its mind, a mismatch is said."""
    preference = Preference({"east": weight, "north": (lambda s: 1 - weight(s)) if callable(weight) else 1 - weight})
    with pytest.raises(ValueError, match="3 samples, received"):
        blender(preference)(ring(), cloud(3), 0.4, step(3, index=5))


def test_weights_follow_progress():
    """At step k of n the preference of progress k/(n - 1) acts: noise first, data last."""
    experts, x = ring(), cloud(5)
    moving = MeanBlend(Preference({"east": lambda s: s, "north": lambda s: 1 - s}, kl_scale=lambda s: 1.5 - s))
    for index, (east, scale) in enumerate([(0.0, 1.5), (0.25, 1.25), (0.5, 1.0), (0.75, 0.75), (1.0, 0.5)]):
        fixed = MeanBlend(Preference({"east": east, "north": 1 - east}, scale))
        now = step(5, index, count=5)
        torch.testing.assert_close(moving(experts, x, 0.4, now), fixed(experts, x, 0.4, now), rtol=1e-13, atol=1e-13)
    assert Step(0, 1, 0.4, 0.0, phases(1)).progress == 0.0


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize("blender", [MeanBlend, SampledBlend])
def test_blends_agree_in_every_parametrization(kind, blender):
    """Coefficients that sum to 1 commute with affine maps: all kinds blend to one score, to 1e-10."""
    x, scale = cloud(), 1.5 if blender is MeanBlend else 0.8
    blend = blender(Preference({"east": 0.3, "north": 0.7}, scale))
    for t in (0.02, 0.4, 0.95):
        score = blend(ring("score"), x, t, step(200))
        other = blend(ring(kind), x, t, step(200))
        back = convert(other, x, t, ring().schedule, kind, "score")
        assert float((back - score).abs().max() / score.abs().max()) < 1e-10


def test_only_experts_with_weight_are_evaluated():
    """A zero coefficient asks for nothing, and sampling asks for one prediction a sample."""
    x = cloud()
    for preference, asked in [
        (Preference({"east": 0.3, "north": 0.7}), ("east", "north")),
        (Preference({"east": 0.3, "north": 0.7}, 0.5), ("base", "east", "north")),
        (Preference({"east": 1, "north": 0}), ("east",)),
        (Preference({"east": 1, "north": 0}, 0), ("base",)),
    ]:
        experts = Counting(ring())
        MeanBlend(preference)(experts, x, 0.4, step(200))
        assert experts.asked == [asked]
    experts = Counting(ring())
    SampledBlend(Preference({"east": 0.3, "north": 0.7}))(experts, x, 0.4, step(200))
    assert experts.asked == [200]


@pytest.mark.parametrize("order", ORDERS)
def test_draws_travel_with_their_sample(order):
    """A sample's draws depend on its own phase alone: the batch may be permuted or chunked."""
    experts, x, n = ring(), cloud(), 200
    blend = SampledBlend(Preference({"east": 0.3, "north": 0.7}, 0.9), order)
    whole = Step(5, 10, 0.4, 0.3, phases(n))
    together = blend(experts, x, 0.4, whole)
    permutation = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    permuted = blend(experts, x[permutation], 0.4, Step(5, 10, 0.4, 0.3, whole.phase[permutation]))
    torch.testing.assert_close(permuted, together[permutation], rtol=1e-12, atol=1e-12)
    parts = [
        blend(experts, x[part], 0.4, Step(5, 10, 0.4, 0.3, whole.phase[part])) for part in torch.arange(n).split(17)
    ]
    torch.testing.assert_close(torch.cat(parts), together, rtol=1e-12, atol=1e-12)
    law = [0.1, 0.27, 0.63]
    choice = blend.choose(law, whole)
    assert torch.equal(blend.choose(law, Step(5, 10, 0.4, 0.3, whole.phase[permutation])), choice[permutation])


@pytest.mark.parametrize("order", ORDERS)
def test_sampled_blend_has_the_mean_blends_mean(order):
    """At one point the draws average to MeanBlend's prediction (MATH.md 6); other weights alarm."""
    experts = ring()
    x = cloud(1).expand(N, 2)
    here = step(N, index=4)

    def p_values(weight):
        mean = MeanBlend(Preference({"east": weight, "north": 1 - weight}, 0.8))(experts, x[:1], 0.4, step(1))[0]
        return [mean_p_value(drawn[:, axis], float(mean[axis])) for axis in (0, 1)]

    drawn = SampledBlend(Preference({"east": 0.3, "north": 0.7}, 0.8), order)(experts, x, 0.4, here)
    assert not alarms(p_values(0.3))
    assert alarms(p_values(0.32))


@pytest.mark.parametrize(
    ("preference", "said"),
    [
        (Preference({"east": 0.5, "north": 0.5}, 1.5), r"base=-0\.5.*use MeanBlend"),
        (Preference({"east": -0.5, "north": 1.5}, allow_negative=True), r"east=-0\.5.*use MeanBlend"),
    ],
)
def test_negative_coefficients_cannot_be_sampled(preference, said):
    """lambda > 1 and negative weights have no categorical law: an error that says what to use instead."""
    with pytest.raises(ValueError, match=said):
        SampledBlend(preference)


def test_bad_input():
    """Experts that do not match the preference, and phases that do not match the batch, are ValueErrors."""
    experts, x, halves = ring(), cloud(), Preference({"east": 0.5, "north": 0.5})
    for blender in (MeanBlend, SampledBlend):
        with pytest.raises(ValueError, match="unknown expert"):
            blender(Preference({"east": 0.5, "nroth": 0.5}))(experts, x, 0.4, step(200))
        with pytest.raises(ValueError, match="no weight for expert"):
            blender(Preference({"east": 1.0}))(experts, x, 0.4, step(200))
    with pytest.raises(ValueError, match="one phase a sample"):
        SampledBlend(halves)(experts, x, 0.4, step(199))
    with pytest.raises(ValueError, match="order must be"):
        SampledBlend(halves, "sobol")
