"""When an idle engine is woken."""

import itertools
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from replicas.lease_watch import BACKOFF_LIMIT_S, WATCH_PERIOD_S, RowSample, WakePolicy

CALM = RowSample(lease_revision=3, applied_revision=3, busy=False, committed_bytes=100, rest_bytes=100)
NEWS = replace(CALM, lease_revision=4)
ABOVE_REST = replace(CALM, committed_bytes=500)


def wakes(policy: WakePolicy, sample: RowSample, from_s: float, for_s: float) -> list[float]:
    """Times at which the policy wakes an engine that does not react."""
    times = [from_s + step * WATCH_PERIOD_S for step in range(int(for_s / WATCH_PERIOD_S))]
    return [now_s for now_s in times if policy.should_wake(sample, now_s)]


def test_calm_engine_sleeps() -> None:
    """An engine that has applied its lease and holds its rest is never woken."""
    assert wakes(WakePolicy(), CALM, 0.0, 100.0) == []


def test_new_lease_wakes_at_once() -> None:
    """A lease that is not applied wakes the engine at the first look."""
    assert WakePolicy().should_wake(NEWS, 0.0)


def test_busy_engine_is_left_alone() -> None:
    """A busy engine reads its lease by itself."""
    assert wakes(WakePolicy(), replace(NEWS, busy=True, committed_bytes=500), 0.0, 10.0) == []


def test_rest_comes_after_idleness() -> None:
    """Bytes above the rest wake the engine once it has been idle for the release time, counted from its last work."""
    policy = WakePolicy(idle_release_s=3.0)
    assert wakes(policy, ABOVE_REST, 0.0, 2.0) == []
    assert not policy.should_wake(replace(ABOVE_REST, busy=True), 2.0)
    assert wakes(policy, ABOVE_REST, 2.1, 2.8) == []
    assert policy.should_wake(ABOVE_REST, 5.2)


def test_vain_wakes_become_rare() -> None:
    """An engine that cannot follow is woken at doubling intervals, in the end once in the longest one."""
    times = wakes(WakePolicy(), NEWS, 0.0, 60.0)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert gaps == sorted(gaps)
    assert gaps[-1] <= BACKOFF_LIMIT_S + WATCH_PERIOD_S
    assert len(times) <= 60 / BACKOFF_LIMIT_S + 5


def test_progress_ends_the_waiting() -> None:
    """Whatever changes in the row, the next wake-up does not wait for the last one's interval."""
    policy = WakePolicy()
    last_s = wakes(policy, NEWS, 0.0, 20.0)[-1]
    assert policy.should_wake(replace(NEWS, committed_bytes=50), last_s + WATCH_PERIOD_S)


@given(st.lists(st.sampled_from([CALM, NEWS, ABOVE_REST, replace(NEWS, busy=True)]), max_size=200))
def test_wakes_only_for_a_reason(samples: list[RowSample]) -> None:
    """No sequence of rows wakes an engine that is busy, or that has applied its lease and holds no more than its
    rest."""
    policy = WakePolicy()
    for step, sample in enumerate(samples):
        if policy.should_wake(sample, step * WATCH_PERIOD_S):
            assert not sample.busy
            assert sample.lease_revision != sample.applied_revision or sample.committed_bytes > sample.rest_bytes
