"""The methods by name: which blender each makes, and which requests each refuses."""

import pytest

from dbtheory.blend import MeanBlend, SampledBlend
from dbtheory.interpolate import InterpolatedBlend
from dbtheory.precision import PrecisionBlend
from dbtheory.preference import Preference
from scale.methods import METHODS, make_blender
from scale.soup import SoupBlend

BOTH = Preference({"a": 0.25, "b": 0.75}, kl_scale=0.5)
ONE = Preference({"a": 1.0}, kl_scale=1.5)


def test_the_methods() -> None:
    """The names that users type are these."""
    assert list(METHODS) == ["base", "mpa", "kla", "mpa-ls", "mpa-held", "msdda", "interp", "rs", "rs-factors"]


def coefficients(blender: MeanBlend | SampledBlend) -> dict[str, float]:
    return blender.preference.coefficients()


def test_mpa_blends_means() -> None:
    """mpa is the mean blend of the preference as given."""
    blender = make_blender("mpa", BOTH, ["a", "b"])
    assert isinstance(blender, MeanBlend)
    assert coefficients(blender) == {"base": 0.5, "a": 0.125, "b": 0.375}


def test_mpa_ls_samples() -> None:
    """mpa-ls samples one expert a step by the preference as given."""
    blender = make_blender("mpa-ls", BOTH, ["a", "b"])
    assert isinstance(blender, SampledBlend)
    assert coefficients(blender) == {"base": 0.5, "a": 0.125, "b": 0.375}


def test_kla_extrapolates_one_adapter() -> None:
    """kla takes lambda above 1: base and one adapter with 1 - lambda and lambda."""
    assert coefficients(make_blender("kla", ONE, ["a"])) == {"base": -0.5, "a": 1.5}


def test_base_follows_no_adapter() -> None:
    """base is the bare model whatever the weights and lambda say."""
    assert coefficients(make_blender("base", BOTH, ["a", "b"])) == {"base": 1.0, "a": 0.0, "b": 0.0}


def test_msdda_without_variances_is_mpa() -> None:
    """Steps of one variance fuse to their mean; with variances they do not."""
    assert make_blender("msdda", BOTH, ["a", "b"]) == make_blender("mpa", BOTH, ["a", "b"])
    blender = make_blender("msdda", BOTH, ["a", "b"], variances={"base": 1.0, "a": 2.0, "b": 1.0})
    assert isinstance(blender, PrecisionBlend)


def test_soups_and_interpolation() -> None:
    """rs averages deltas, rs-factors factors; interp takes midpoints, whose adapters have no weight."""
    assert make_blender("rs", BOTH, ["a", "b"]) == SoupBlend(BOTH, "deltas")
    assert make_blender("rs-factors", BOTH, ["a", "b"]) == SoupBlend(BOTH, "factors")
    blender = make_blender("interp", BOTH, ["a", "b", "ab"], midpoints={("a", "b"): "ab"})
    assert blender == InterpolatedBlend(BOTH, {("a", "b"): "ab"})


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("mpa", {"order": "iid"}, "order belongs to the method mpa-ls"),
        ("mpa", {"variances": {"base": 1.0}}, "variances belongs to the method msdda"),
        ("mpa-ls", {"order": "random"}, "low-discrepancy"),
        ("msdda", {"variances": {"a": 1.0, "b": 1.0}}, "base"),
        ("msdda", {"variances": {"base": 1.0, "a": -1.0, "b": 1.0}}, "positive"),
        ("interp", {}, "middle of edges"),
        ("interp", {"midpoints": {("a", "b"): "ab"}}, "no adapter for the midpoint ab"),
        ("mpa", {"exact": 0.5}, "exact belongs to the method mpa-held"),
        ("mpa-held", {"exact": 0.0}, "exact is the share"),
        ("rs", {"midpoints": {("a", "b"): "a"}}, "midpoints belongs to the method interp"),
    ],
)
def test_wrong_options_are_refused(method: str, options: dict, reason: str) -> None:
    """An option of another method, or one that its method cannot use, is named."""
    with pytest.raises(ValueError, match=reason):
        make_blender(method, BOTH, ["a", "b"], **options)


@pytest.mark.parametrize(
    ("method", "preference", "adapters", "reason"),
    [
        ("soup", BOTH, ["a", "b"], "unknown method 'soup'; the methods are base, mpa, kla, mpa-ls"),
        ("MPA", BOTH, ["a", "b"], "unknown method"),
        ("kla", BOTH, ["a", "b"], "one adapter, received a, b"),
        ("mpa-ls", ONE, ["a"], "kl_scale is a probability, received 1.5; use mpa"),
        ("mpa", BOTH, ["a"], 'unknown expert "b"'),
        ("mpa", ONE, ["a", "b"], 'no weight for expert "b"'),
        ("mpa", ONE, [], 'unknown expert "a"'),
    ],
)
def test_wrong_requests_are_refused(method: str, preference: Preference, adapters: list[str], reason: str) -> None:
    """A method that cannot do what is asked says so before any model runs."""
    with pytest.raises(ValueError, match=reason):
        make_blender(method, preference, adapters)
