"""How late a paced token was."""

import pytest

from benchmarks.serving_path.measure import late_ms


def test_tokens_are_measured_against_the_engines_clock() -> None:
    """A token's due time is its step's multiple of the period, whichever token came with the least delay."""
    period_s = 0.02
    delays_s = [0.009, 0.004, 0.001, 0.019, 0.002]
    arrivals = [100.0 + 7 * period_s + number * period_s + delay for number, delay in enumerate(delays_s)]
    assert late_ms(arrivals, period_s) == pytest.approx([9, 4, 1, 19, 2], abs=1e-6)


def test_tokens_that_come_together_are_late_by_their_number() -> None:
    """Three tokens in one chunk: the last is in time, the others as late as the periods they waited."""
    assert late_ms([10.041, 10.041, 10.041], 0.02) == pytest.approx([41, 21, 1], abs=1e-6)
