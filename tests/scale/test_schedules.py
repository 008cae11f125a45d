"""Numbers that change with progress, as users write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale.schedules import PiecewiseLinear, parse_amount

finite = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: value + 0.0)


@pytest.mark.parametrize(
    ("text", "progress", "value"),
    [
        ("0.2->0.8", 0.0, 0.2),
        ("0.2->0.8", 1.0, 0.8),
        ("0.2->0.8", 0.25, 0.35),
        ("0.2->0.8->0.5", 0.5, 0.8),
        ("0.2->0.8->0.5", 0.25, 0.5),
        ("0.2->0.8->0.5", 0.75, 0.65),
        ("-1->1", 0.5, 0.0),
        ("1->-1", 1.0, -1.0),
        (" 1 -> 2 ", 0.5, 1.5),
        ("1e-1->2E0", 1.0, 2.0),
        ("0->0->0->9", 1.0, 9.0),
    ],
)
def test_functions_of_progress(text: str, progress: float, value: float) -> None:
    """The first number is at noise (progress 0), the last at data (1), the others between at equal distances."""
    amount = parse_amount("x", text)
    assert isinstance(amount, PiecewiseLinear)
    assert amount(progress) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(("text", "value"), [("1", 1.0), ("-0.5", -0.5), (".2", 0.2), ("1e-3", 0.001), (" 2 ", 2.0)])
def test_plain_numbers(text: str, value: float) -> None:
    """Without an arrow it is a number, as before."""
    assert parse_amount("x", text) == value


@given(st.lists(finite, min_size=2, max_size=9), st.floats(0, 1))
def test_it_is_linear_between_its_knots(values: list[float], progress: float) -> None:
    """Knots are hit exactly; elsewhere it lies on the chord: checked by numpy's interpolation."""
    import numpy as np

    amount = parse_amount("x", "->".join(map(repr, values)))
    assert isinstance(amount, PiecewiseLinear)
    assert [amount(knot) for knot in amount.knots] == values
    size = max(map(abs, values))
    assert amount(progress) == pytest.approx(np.interp(progress, amount.knots, values), abs=1e-12 * (1 + size))


@given(st.lists(finite, min_size=2, max_size=9))
def test_its_text_gives_it_back(values: list[float]) -> None:
    """The record holds the text, from which the function can be made again."""
    amount = PiecewiseLinear(tuple(values))
    assert parse_amount("x", str(amount)) == amount


WRONG = [
    "", " ", "->", "->1", "1->", "1->->2", "0.2->", "0.2-", "0.2->x", "a->b", "0.2-->0.8", "0.2>0.8",
    "0.2→0.8", "٠.٢->١",
    "1->2 3", "1_0", "0x1", "1,5", "True", "1->\x00", "1\n2", "½", "-", "--1", "1->2->", "[1]", "1;2", "💥->1",
]  # fmt: skip
INFINITE = ["nan", "inf", "-inf", "1e400", "nan->1", "0->inf", "0->-Infinity->1", "1e400->1"]


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_number_is_refused(text: str) -> None:
    """A ValueError that names the flag and what was typed."""
    with pytest.raises(ValueError, match=r"^the weight of 'a' must be a number, or several as in") as refusal:
        parse_amount("the weight of 'a'", text)
    assert repr(text) in str(refusal.value)


@pytest.mark.parametrize("text", INFINITE)
def test_what_is_not_finite_is_refused(text: str) -> None:
    """No NaN and no infinity, wherever it stands."""
    with pytest.raises(ValueError, match=r"^kl_scale must be finite, received"):
        parse_amount("kl_scale", text)


@given(st.text(max_size=40) | st.text(alphabet="0123456789.->enaif+ ", max_size=40))
def test_any_text_is_a_number_or_a_value_error(text: str) -> None:
    """Nothing else ever comes out, whatever is typed."""
    try:
        amount = parse_amount("x", text)
    except ValueError:
        return
    assert isinstance(amount, float | PiecewiseLinear)
