"""The logical size: the paper's rule, bounded, and calm under noise."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_agent.errors import SettingsError
from memory_agent.logical_size import PAUSE_S, REVERSE_PAUSE_S, LogicalSize, SloSample

TTFT, TPOT, BOTH, FINE = SloSample(ttft=True), SloSample(tpot=True), SloSample(True, True), SloSample()
samples = st.sampled_from([TTFT, TPOT, BOTH, FINE])


def sizes(state: LogicalSize, stream: list[SloSample], step_s: float = 0.01, start_s: float = 0.0) -> list[int]:
    """The size after each sample, ``step_s`` apart."""
    seen = []
    for at, sample in enumerate(stream):
        state = state.sampled(sample, start_s + at * step_s)
        seen.append(state.size)
    return seen


def test_three_slow_decodes_of_five_halve_the_size() -> None:
    """The third violation of TPOT within five iterations halves, not the second."""
    assert sizes(LogicalSize(64, 1, 100), [TPOT, FINE, TPOT, FINE, TPOT]) == [64, 64, 64, 64, 32]


def test_three_late_first_tokens_of_five_double_the_size() -> None:
    """The third violation of TTFT within five iterations doubles, up to the ceiling."""
    assert sizes(LogicalSize(32, 1, 100), [TTFT, TTFT, FINE, TTFT]) == [32, 32, 32, 64]
    assert sizes(LogicalSize(64, 1, 100), [TTFT] * 3)[-1] == 100


def test_violations_further_apart_change_nothing() -> None:
    """Two violations in every five iterations, for ever, leave the size alone."""
    assert set(sizes(LogicalSize(64, 1, 100), [TPOT, FINE, FINE, TPOT, FINE] * 50)) == {64}


def test_a_change_needs_violations_of_its_own_and_a_pause() -> None:
    """The violations that led to one change do not lead to the next; without end they halve once a pause."""
    seen = sizes(LogicalSize(64, 1, 100), [TPOT] * 60, step_s=PAUSE_S / 20)
    assert [seen[at] for at in (1, 2, 21, 22, 41, 42)] == [64, 32, 32, 16, 16, 8]


def test_a_turn_back_waits_longer() -> None:
    """After a halving, late first tokens double the size only when the longer pause is over."""
    state = LogicalSize(64, 1, 100)
    for at in range(3):
        state = state.sampled(TPOT, at * 0.01)
    assert state.size == 32
    assert set(sizes(state, [TTFT] * 20, start_s=REVERSE_PAUSE_S - 1)) == {32}
    assert sizes(state, [TTFT] * 3, start_s=REVERSE_PAUSE_S + 0.1)[-1] == 64


def test_overload_of_both_kinds_changes_nothing() -> None:
    """Where the same iterations violate both objectives no size would help, and it stays."""
    assert set(sizes(LogicalSize(64, 1, 100), [BOTH] * 100, step_s=1.0)) == {64}


@given(
    pattern=st.sampled_from([[TTFT, TPOT], [TPOT, TTFT], [TTFT, TTFT, TPOT, TPOT], [FINE, TTFT, TPOT], [BOTH, FINE]]),
    step_s=st.floats(0.001, 100.0),
)
def test_alternating_violations_change_nothing(pattern: list[SloSample], step_s: float) -> None:
    """Noise that violates one objective after the other moves the size not once, however slow the iterations."""
    assert set(sizes(LogicalSize(64, 1, 128), pattern * 40, step_s)) == {64}


@given(
    stream=st.lists(st.tuples(samples, st.floats(0.0, 3.0)), max_size=120),
    floor=st.integers(1, 20),
    ceiling=st.integers(0, 200),
    start=st.integers(0, 200),
)
def test_the_size_is_bounded_and_changes_rarely(
    stream: list[tuple[SloSample, float]], floor: int, ceiling: int, start: int
) -> None:
    """Whatever happens: the size stays inside, changes for a reason, by the factor or to a bound, keeps the pause
    between changes and the longer pause between turns."""
    state = LogicalSize(min(max(start, floor), ceiling), floor, ceiling)
    now, changes = 0.0, list[tuple[float, bool]]()
    for sample, wait_s in stream:
        now += wait_s
        window = [*state.recent, sample][-5:]
        before, state = state.size, state.sampled(sample, now)
        assert min(floor, ceiling) <= state.size <= ceiling
        if state.size != before:
            grew = state.size > before
            assert state.size == (min(before * 2, ceiling) if grew else max(before // 2, floor))
            assert sum(seen.ttft if grew else seen.tpot for seen in window) >= 3
            changes.append((now, grew))
    for (earlier, was), (later, grew) in itertools.pairwise(changes):
        assert later - earlier >= (PAUSE_S if was == grew else REVERSE_PAUSE_S)


@given(st.lists(st.integers(0, 300), max_size=20), st.integers(1, 50))
def test_the_size_follows_a_changing_ceiling(ceilings: list[int], floor: int) -> None:
    """A lower ceiling cuts the size at once, a ceiling of nothing to nothing, and it comes back to the floor at least;
    a higher one alone enlarges nothing beyond that."""
    state = LogicalSize(100, floor, 100)
    for ceiling in ceilings:
        before, state = state, state.limited(ceiling)
        assert state.size == min(max(before.size, floor), ceiling)
        assert (state.recent, state.changed_at) == (before.recent, before.changed_at)


@pytest.mark.parametrize(("size", "floor", "ceiling"), [(5, 0, 10), (11, 1, 10), (1, 2, 10), (0, 1, -1)])
def test_impossible_settings_are_refused(size: int, floor: int, ceiling: int) -> None:
    """A floor of nothing, and a size outside floor and ceiling, are settings errors."""
    with pytest.raises(SettingsError, match="floor of at least 1"):
        LogicalSize(size, floor, ceiling)
