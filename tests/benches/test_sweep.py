"""What `benches.sweep` counts as work."""

from benches.sweep import covered


def test_time_that_two_threads_work_at_once_counts_once() -> None:
    """The union of intervals: overlapping, nested, apart, and in any order."""
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.75)]) == 4.0
    assert covered([]) == 0.0
