"""Preference: the only place that validates what the user asks for."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbtheory import Preference

HALVES = {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ({"a": -0.25, "b": 1.25}, '"a" is negative'),
        ({"a": math.nan, "b": 1.0}, '"a" must be a finite number'),
        ({"a": 1.0, "b": math.inf}, '"b" must be a finite number'),
        ({"a": -math.inf, "b": 1.0}, '"a" must be a finite number'),
        ({"a": "0.5", "b": 0.5}, '"a" must be a finite number'),
        ({"a": None, "b": 1.0}, '"a" must be a finite number'),
        ({"a": torch.tensor([[0.5, 0.5]]), "b": 0.5}, '"a" must be a finite number'),
        ({"a": torch.tensor([0.5, math.nan]), "b": 0.5}, '"a" must hold finite numbers'),
        ({"a": torch.tensor([0.5, -0.5]), "b": torch.tensor([0.5, 1.5])}, '"a" is negative'),
        ({"a": torch.tensor([0.5, 0.6]), "b": 0.5}, "sum to 1"),
        ({"a": torch.full((2,), 0.5), "b": torch.full((3,), 0.5)}, "tensors of one length"),
        ({"a": lambda s: s, "b": 0.5}, "sum to 1"),
        ({"a": lambda s: 2 * s, "b": lambda s: 1 - 2 * s}, '"b" is negative'),
        ({"a": lambda s: "1", "b": 0.0}, '"a" must be a finite number'),
        ({"a": lambda s: math.sin, "b": 0.0}, '"a" must return a number'),
        ({"a": 0.5, "b": 0.4}, "sum to 1"),
        ({"a": 0.5, "b": 0.5 + 2e-6}, "sum to 1"),
        ({"a": 0.0, "b": 0.0}, "sum to 1"),
        ({"a": 1e308, "b": 1e308}, "sum to 1"),
        ({}, "at least one weight"),
        ({"base": 0.5, "a": 0.5}, '"base" takes no weight'),
    ],
)
def test_bad_weights_are_refused_by_name(weights, named):
    """Every bad weight is a ValueError that names it, because a silent one would blend the wrong target."""
    with pytest.raises(ValueError, match=named):
        Preference(weights)


@pytest.mark.parametrize(
    "scale", [-0.1, -math.inf, math.inf, math.nan, "1", None, torch.tensor([1.0, -0.1]), lambda s: s - 0.5]
)
def test_bad_kl_scale_is_refused(scale):
    """A negative, infinite, NaN or textual lambda has no target."""
    with pytest.raises(ValueError, match="kl_scale"):
        Preference(HALVES, kl_scale=scale)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("base", "a", "c"), 'unknown expert "b"'),
        (("base", "a"), 'unknown expert "b"'),
        (("base", "a", "b", "c"), 'no weight for expert "c"'),
        (("base",), 'unknown expert "a", "b"'),
    ],
)
def test_unknown_and_missing_experts_are_named(names, said):
    """Weights must match the experts at hand, and zeros must be said: a gap is usually a slip."""
    with pytest.raises(ValueError, match=said):
        Preference(HALVES).validate(names)


def test_matching_experts_pass_in_any_order():
    """`validate` accepts the experts with or without the base, in any order."""
    for names in (("base", "a", "b"), ("b", "a"), ["a", "base", "b"]):
        Preference(HALVES).validate(names)


def test_sums_that_miss_one_by_rounding_pass():
    """0.7 + 0.2 + 0.1 is 0.9999999999999999 in binary: it must pass, and be renormalised."""
    preference = Preference({"a": 0.7, "b": 0.2, "c": 0.1})
    assert 0.7 + 0.2 + 0.1 != 1.0
    assert math.fsum(preference.values) == pytest.approx(1.0, abs=1e-15)
    assert Preference({"a": 0.5, "b": 0.5 + 9e-7}).weights["a"] < 0.5


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=6).filter(lambda raw: sum(raw) > 1e-3),
    st.floats(0, 5),
    st.sampled_from([float, np.float64, np.float32, torch.tensor]),
)
def test_coefficients_sum_to_one(raw, scale, number):
    """The coefficients sum to 1: that alone makes blending eps the same as blending scores."""
    weights = {f"r{i}": number(value / sum(raw)) for i, value in enumerate(raw)}
    coefficients = Preference(weights, scale).coefficients()
    assert list(coefficients) == ["base", *weights]
    assert math.fsum(coefficients.values()) == pytest.approx(1.0, abs=1e-12)
    assert coefficients["base"] == 1.0 - scale


def test_one_hot_is_exact():
    """A one-hot preference has coefficients exactly 0 and 1, also where its weight was rounded."""
    for one in (1, 1.0, 1.0 + 5e-7, 1.0 - 5e-7):
        assert Preference({"a": 0, "b": one}).coefficients() == {"base": 0.0, "a": 0.0, "b": 1.0}
    assert Preference(HALVES, kl_scale=0).coefficients() == {"base": 1.0, "a": 0.0, "b": 0.0}


def test_negative_weights_only_on_request():
    """`allow_negative=True` is the only way to a negative weight, and the sum must still be 1."""
    assert Preference({"a": -0.5, "b": 1.5}, allow_negative=True).coefficients()["a"] == -0.5
    with pytest.raises(ValueError, match="sum to 1"):
        Preference({"a": -0.5, "b": 0.5}, allow_negative=True)


def test_a_preference_is_a_value():
    """Preferences are immutable, comparable, hashable and survive pickling, so that records can hold them."""
    weights = dict(HALVES)
    preference = Preference(weights, kl_scale=1.5)
    weights["a"] = 7.0
    preference.weights["a"] = 7.0
    assert preference == Preference(HALVES, kl_scale=1.5)
    assert hash(preference) == hash(Preference(HALVES, 1.5))
    assert pickle.loads(pickle.dumps(preference)) == preference
    with pytest.raises(AttributeError):
        preference.kl_scale = 2.0  # type: ignore[misc]


def test_one_preference_a_sample():
    """Tensors hold one preference a sample; numbers beside them serve every row; each row is renormalised."""
    preference = Preference({"a": torch.tensor([0.0, 0.25, 1.0]), "b": torch.tensor([1.0, 0.75, 0.0])}, kl_scale=2)
    assert preference.rows == 3
    assert preference.is_constant
    coefficients = preference.coefficients()
    assert coefficients["base"] == -1.0
    assert coefficients["a"].tolist() == [0.0, 0.5, 2.0]
    scaled = Preference(HALVES, kl_scale=torch.tensor([0.0, 1.0, 1.5]))
    total = sum(scaled.coefficients().values())
    torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64))
    assert scaled.coefficients()["base"].tolist() == [1.0, 0.0, -0.5]
    assert Preference(HALVES).rows is None


def test_functions_of_progress():
    """Weights and lambda may change from noise (0) to data (1); asking without a progress is an error."""
    preference = Preference({"a": lambda s: s, "b": lambda s: 1 - s}, kl_scale=lambda s: 1 + s)
    assert not preference.is_constant
    assert preference.coefficients(0.0) == {"base": 0.0, "a": 0.0, "b": 1.0}
    assert preference.coefficients(1.0) == {"base": -1.0, "a": 2.0, "b": 0.0}
    assert preference.at(0.25) == Preference({"a": 0.25, "b": 0.75}, kl_scale=1.25)
    with pytest.raises(ValueError, match="function of progress"):
        preference.coefficients()
    for progress in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="progress must lie in"):
            preference.at(progress)


def test_functions_are_checked_at_every_step():
    """A function that is bad only between the probes is refused at the step that meets it, not blended."""
    preference = Preference({"a": lambda s: 1.5 if s == 0.3 else 0.5, "b": 0.5})
    with pytest.raises(ValueError, match="sum to 1"):
        preference.coefficients(0.3)


def test_preferences_with_tensors_and_functions_compare():
    """Equal tensors and identical functions make equal preferences, and comparing never raises."""
    rows = torch.tensor([0.5, 0.25])
    mine, same, other = (Preference({"a": w, "b": 1 - w}) for w in (rows, rows.clone(), rows.flip(0)))
    assert mine == same
    assert hash(mine) == hash(same)
    assert mine != other
    assert mine != Preference(HALVES)
    rows[0] = 0.9
    assert mine == same
