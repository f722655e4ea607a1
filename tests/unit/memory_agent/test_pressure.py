"""Pressure levels and smoothed demand."""

from hypothesis import given
from hypothesis import strategies as st

from memory_agent.demand import HOLD_S, DemandPeak
from memory_agent.pressure import RELEASE_GAP, RISE_AT, Pressure, usage_ratio
from memory_agent.reports import PressureLevel

NORMAL, ELEVATED, CRITICAL = PressureLevel


def after(*ratios: float, start: Pressure | None = None) -> Pressure:
    state = start or Pressure()
    for ratio in ratios:
        state = state.sampled(ratio)
    return state


def test_levels_rise_at_their_thresholds() -> None:
    """Two samples at a threshold reach its level; just below it they do not."""
    assert after(0.849, 0.849).level is NORMAL
    assert after(0.85, 0.85).level is ELEVATED
    assert after(0.969, 0.969).level is ELEVATED
    assert after(0.97, 0.97).level is CRITICAL


def test_one_sample_alone_raises_nothing() -> None:
    """A single high sample between low ones is a limit about to be raised, not pressure."""
    assert after(0.2, 5.0, 0.2, 5.0, 0.2).level is NORMAL
    assert after(0.2, 5.0, 0.9).level is ELEVATED, "both samples are above 0.85, one alone above 0.97"


def test_levels_are_left_a_gap_below_their_threshold() -> None:
    """A level holds until the ratio has fallen 0.05 below its threshold, then the next lower one that fits applies."""
    critical = after(1.0, 1.0)
    assert after(0.93, start=critical).level is CRITICAL
    assert after(0.91, start=critical).level is ELEVATED
    assert after(0.79, start=critical).level is NORMAL
    assert after(0.81, start=after(0.91, start=critical)).level is ELEVATED


@given(st.lists(st.floats(0.0, 2.0), min_size=2))
def test_level_always_agrees_with_the_ratio(ratios: list[float]) -> None:
    """No level outlives a ratio far below it, and two samples above a threshold always reach its level."""
    level = after(*ratios).level
    if level is not NORMAL:
        assert ratios[-1] >= RISE_AT[level] - RELEASE_GAP
    for candidate, at in RISE_AT.items():
        if min(ratios[-2:]) >= at:
            assert level >= candidate


@given(st.floats(0.90, 1.0), st.lists(st.floats(-0.024, 0.024), max_size=50))
def test_small_noise_changes_a_level_once_at_most(base: float, noise: list[float]) -> None:
    """Noise narrower than the gap, around any ratio, does not make a level flap."""
    state, levels = Pressure(), []
    for step in noise:
        state = state.sampled(base + step)
        levels.append(state.level)
    assert levels == sorted(levels)


def test_usage_ratio_of_nothing() -> None:
    """Nothing wanted is no pressure even where nothing can be had; something wanted of nothing is all of it."""
    assert usage_ratio(0, 0) == 0.0
    assert usage_ratio(1, 0) == float("inf")
    assert after(usage_ratio(1, 0), usage_ratio(1, 0)).level is CRITICAL


def test_demand_rises_at_once_and_falls_later() -> None:
    """A higher sample counts immediately; a lower one only after it has lasted for HOLD_S, at most twice that."""
    peak = DemandPeak().observed(10, 100.0)
    assert peak.observed(50, 100.01).demand_bytes == 50
    falling, now = peak.observed(50, 100.01), 100.01
    while falling.demand_bytes == 50:
        now += 0.05
        falling = falling.observed(10, now)
    assert HOLD_S <= now - 100.01 <= 2 * HOLD_S + 0.05
    assert falling.demand_bytes == 10


def test_demand_that_returns_in_time_never_falls() -> None:
    """Demand that comes and goes several times within HOLD_S is seen as its peak all the while."""
    peak, seen = DemandPeak(), []
    for step in range(100):
        peak = peak.observed(100 if step % 4 == 0 else 0, 5.0 + step * 0.05)
        seen.append(peak.demand_bytes)
    assert set(seen) == {100}


def test_demand_after_a_pause_is_the_sample() -> None:
    """After no sample for long, what was seen before the pause counts for nothing."""
    assert DemandPeak().observed(100, 1.0).observed(3, 50.0).demand_bytes == 3
