"""Which replica a request goes to."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from cluster.routing_score import Candidate, rank
from memory_agent.reports import PressureLevel

CRITICAL, ELEVATED, NORMAL = PressureLevel.CRITICAL, PressureLevel.ELEVATED, PressureLevel.NORMAL

candidates = st.lists(
    st.builds(
        Candidate,
        replica_id=st.uuids().map(str),
        in_flight=st.integers(0, 50),
        pressure=st.sampled_from(PressureLevel),
        running=st.integers(0, 50),
        waiting=st.integers(0, 50),
    ),
    max_size=8,
    unique_by=lambda candidate: candidate.replica_id,
)


def in_order() -> float:
    """Breaks no tie: the order of the candidates stays."""
    return 0.0


def test_fewest_requests_ahead_wins() -> None:
    """Without anything from the controller the replica with the fewest requests in flight comes first."""
    assert rank([Candidate("a", 3), Candidate("b", 1), Candidate("c", 2)], in_order) == ["b", "c", "a"]


def test_reported_load_of_other_ingresses_counts() -> None:
    """Requests that another ingress has sent are seen in the engine's own count."""
    assert rank([Candidate("a", 0, running=9), Candidate("b", 2)], in_order) == ["b", "a"]


def test_waiting_weighs_more_than_running() -> None:
    """A queue in an engine repels more than as many running requests."""
    assert rank([Candidate("a", 0, waiting=3), Candidate("b", 0, running=4)], in_order) == ["b", "a"]


def test_critical_pressure_is_last_whatever_the_load() -> None:
    """A replica under critical pressure gets nothing while another one is not, however loaded that one is."""
    assert rank([Candidate("a", 0, CRITICAL), Candidate("b", 100, ELEVATED)], in_order) == ["b", "a"]


def test_critical_everywhere_falls_back_to_load() -> None:
    """Where all replicas are under critical pressure the least loaded one is used."""
    assert rank([Candidate("a", 4, CRITICAL), Candidate("b", 2, CRITICAL)], in_order) == ["b", "a"]


def test_elevated_pressure_weighs_as_some_requests() -> None:
    """Elevated pressure is worth a few requests, not a ban."""
    assert rank([Candidate("a", 0, ELEVATED), Candidate("b", 2)], in_order) == ["b", "a"]
    assert rank([Candidate("a", 0, ELEVATED), Candidate("b", 9)], in_order) == ["a", "b"]


def test_tie_break_decides_between_equals() -> None:
    """Equal replicas are ordered by the tie break."""
    breaks = itertools.count(0, -1)
    assert rank([Candidate("a", 1), Candidate("b", 1)], lambda: float(next(breaks))) == ["b", "a"]


@given(candidates)
def test_everyone_is_ranked_once_and_critical_ones_last(given: list[Candidate]) -> None:
    """The ranking is a permutation, and no replica under critical pressure precedes one that is not."""
    order = rank(given, in_order)
    assert sorted(order) == sorted(candidate.replica_id for candidate in given)
    pressure = {candidate.replica_id: candidate.pressure for candidate in given}
    critical = [pressure[replica_id] == CRITICAL for replica_id in order]
    assert critical == sorted(critical)


@given(candidates)
def test_load_grows_with_each_part(given: list[Candidate]) -> None:
    """One more running or waiting request, or one more in flight, never makes a replica look less loaded."""
    for one in given:
        parts = (one.replica_id, one.in_flight, one.pressure, one.running, one.waiting)
        for more in ((0, 1, 0, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1)):
            grown = Candidate(parts[0], parts[1] + more[1], parts[2], parts[3] + more[3], parts[4] + more[4])
            assert grown.load >= one.load
