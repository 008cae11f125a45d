"""The promises' table: what is measured, and how it is judged."""

import pytest

import toys
from toys import targets
from toys.problem import Budget


def one(reference=1.0, measured=0.1, floor=0.0, limit=0.2):
    return targets.Target("toy", "what", reference, measured, floor, limit)


def test_verdicts():
    """A ratio within its limit holds; above it, only a method as close as exact draws is excused."""
    assert one(measured=0.2, floor=0.01).verdict == targets.HOLDS
    assert one(measured=0.21).verdict == targets.FAILS
    assert one(measured=0.3, floor=0.25).verdict == targets.FLOOR
    assert one(measured=0.5, floor=0.25).verdict == targets.FAILS


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "KL_DRAWS", 40)
        return list(targets.measure(toys.get("ring-of-six"), Budget(samples=2000, steps=50)))


def test_every_promise_has_a_row(rows):
    """Four corrections, three interpolations (none at a node) and three step counts, with sensible numbers."""
    assert [row.what.split(" / ")[0] for row in rows] == ["corrected"] * 3 + ["corrected quadratic"] + [
        "quadratic"
    ] * 3 + ["low-discrepancy"] * 3
    assert [row.limit for row in rows] == [0.2] * 4 + [1 / 3] * 6
    assert all(row.reference > 0 and row.measured > 0 for row in rows)
    assert all(
        row.toy in line and row.verdict in line
        for row, line in zip(rows, targets.table(rows).splitlines()[1:], strict=True)
    )


def test_what_is_proven_shows_in_small_runs(rows):
    """Correction and low discrepancy beat their peers clearly, and the path KL of interpolation is far smaller."""
    for row in (*rows[:4], *rows[7:]):
        assert row.ratio < 0.75
    for row in rows[4:7]:
        before, after = (float(part) for part in row.note.removeprefix("path KL ").split(" -> "))
        assert after < before / 3
