"""The rate of work while there is some."""

import math

import pytest

from cluster.busy_rate import BusyRate


def test_nothing_done_is_no_rate() -> None:
    """Before anything was done the caller's own answer counts."""
    rate = BusyRate()
    rate.set_busy(True, 0.0)
    assert rate.seconds_for(5, 1.0, unknown=7.0) == 7.0
    assert rate.per_s(1.0, math.inf) == math.inf


def test_what_is_done_while_there_is_nothing_to_do_does_not_count() -> None:
    """Work that ends while nobody waits for it is no sign of a high rate."""
    rate = BusyRate()
    for at in range(100):
        rate.done(1, at / 100)
    rate.set_busy(True, 2.0)
    assert rate.per_s(2.1, math.nan) is math.nan
    rate.done(1, 2.5)
    assert rate.per_s(2.5, math.nan) == pytest.approx(2.0)


def test_a_credit_is_used_up_by_standstill() -> None:
    """Unknown at first, then what was lent over the time in which nothing was done."""
    rate = BusyRate(credit=100.0)
    rate.set_busy(True, 0.0)
    assert rate.per_s(0.0, math.inf) == math.inf
    assert rate.per_s(2.0, math.inf) == pytest.approx(50.0)
    assert rate.per_s(200.0, math.inf) < 1.0


def test_idle_time_does_not_count() -> None:
    """Ten a second while busy is ten a second after an hour without work."""
    rate = BusyRate()
    rate.set_busy(True, 0.0)
    for at in range(1, 11):
        rate.done(1, at / 10)
    rate.set_busy(False, 1.0)
    assert rate.per_s(3600.0, math.nan) == pytest.approx(10.0)
    assert rate.seconds_for(20, 3600.0, math.nan) == pytest.approx(2.0)


def test_a_change_is_learned_and_standstill_is_seen_at_once() -> None:
    """The old rate is forgotten over some busy seconds; while nothing is done any more it falls without an event."""
    rate = BusyRate()
    rate.set_busy(True, 0.0)
    for at in range(1, 101):
        rate.done(1, at / 10)
    assert rate.per_s(10.0, math.nan) == pytest.approx(10.0)
    for at in range(1, 61):
        rate.done(5, 10.0 + at)
    assert rate.per_s(70.0, math.nan) == pytest.approx(5.0, rel=0.1)
    assert rate.per_s(200.0, math.nan) < 0.5
