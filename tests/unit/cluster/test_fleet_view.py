"""What a router knows of its replicas."""

from dataclasses import dataclass

from cluster.fleet_view import STALE_AFTER_S, FleetView
from memory_agent.reports import PressureLevel


@dataclass
class Report:
    level: PressureLevel = PressureLevel.NORMAL
    kv_usage: float = 0.5
    running: int = 0
    waiting: int = 0
    age_s: float = 0.0
    kv_tokens: int = 1000
    kv_share_tokens: int = 0
    max_num_seqs: int = 8


def test_requests_are_those_reported_and_those_since() -> None:
    """What was sent and what ended after the report changes its count; a newer report starts from its own."""
    fleet = FleetView(["a", "b"])
    fleet.take({"a": Report(running=3, waiting=1)}, 10.0)
    fleet.sent(0, 100)
    fleet.sent(0, 100)
    fleet.ended(0)
    assert list(fleet.requests) == [5.0, 0.0]
    fleet.take({"a": Report(running=4)}, 11.0)
    assert fleet.requests[0] == 4.0


def test_what_is_on_loan_is_the_replicas_own() -> None:
    """An idle replica whose memory others have for now can hold what it gets back; what it uses stays what it is."""
    fleet = FleetView(["a", "b"])
    fleet.take({"a": Report(kv_usage=0.5, kv_tokens=100, kv_share_tokens=4000), "b": Report(kv_tokens=9000)}, 10.0)
    assert list(fleet.kv_tokens) == [4000.0, 9000.0]
    assert fleet.kv_used[0] == 50.0


def test_own_requests_count_though_a_report_does_not_show_them_yet() -> None:
    """What is in flight from here is the least that a replica can have."""
    fleet = FleetView(["a"])
    fleet.sent(0, 1)
    fleet.sent(0, 1)
    fleet.take({"a": Report(running=0)}, 10.0)
    assert fleet.requests[0] == 2.0


def test_pending_tokens_last_until_the_first_token() -> None:
    """A prompt is pending from its sending until its first token, or its end without one."""
    fleet = FleetView(["a"])
    fleet.sent(0, 100)
    fleet.sent(0, 30)
    fleet.first_token(0, 100)
    assert fleet.pending_tokens[0] == 30
    fleet.ended(0, 30)
    assert fleet.pending_tokens[0] == 0


def test_reports_from_the_past_and_of_strangers_are_passed_over() -> None:
    """A report no newer than the known one, or of a replica that is not there, changes nothing."""
    fleet = FleetView(["a"])
    fleet.take({"a": Report(running=3)}, 10.0)
    fleet.take({"a": Report(running=9, age_s=1.0), "ghost": Report(running=9)}, 10.5)
    assert list(fleet.running) == [3.0]


def test_an_old_report_is_not_fresh() -> None:
    """Freshness ends STALE_AFTER_S after the report was taken; before any there is none."""
    fleet = FleetView(["a", "b"])
    fleet.take({"a": Report(age_s=1.0)}, 10.0)
    assert list(fleet.fresh(9.0 + STALE_AFTER_S)) == [True, False]
    assert list(fleet.fresh(9.1 + STALE_AFTER_S)) == [False, False]


def test_a_failed_replica_is_left_out_longer_each_time_and_taken_back_on_trial() -> None:
    """After a failure a replica gets nothing, then one request; its first token brings it back, another failure
    leaves it out for twice as long."""
    fleet = FleetView(["a"])
    fleet.failed(0, 100.0)
    assert fleet.left_out(100.9)[0] and not fleet.left_out(101.1)[0]
    fleet.sent(0, 10)
    assert fleet.left_out(101.1)[0]  # one request is enough to find out
    fleet.ended(0, 10)
    fleet.failed(0, 102.0)
    assert fleet.left_out(103.9)[0] and not fleet.left_out(104.1)[0]
    fleet.sent(0, 10)
    fleet.first_token(0, 10)
    assert not fleet.left_out(104.1)[0]


def test_failures_of_one_absence_count_once() -> None:
    """Requests that fail while the replica is left out were sent before: they do not make its absence longer."""
    fleet = FleetView(["a"])
    for at in range(5):
        fleet.failed(0, 100.0 + at / 10)
    assert not fleet.left_out(101.1)[0]
    fleet.failed(0, 101.2)
    assert fleet.left_out(103.1)[0] and not fleet.left_out(103.3)[0]


def test_old_requests_do_not_stand_for_the_trial() -> None:
    """What a failed replica still has from before keeps nobody from trying it; what was sent since does."""
    fleet = FleetView(["a"])
    fleet.sent(0, 10)
    fleet.failed(0, 100.0)
    assert not fleet.left_out(101.1)[0]
    fleet.sent(0, 10)
    assert fleet.left_out(101.1)[0]


def test_an_answer_begins_the_trial_at_once() -> None:
    """A replica that answers again need not wait until its time is over, but proves itself with one request."""
    fleet = FleetView(["a"])
    fleet.failed(0, 100.0)
    fleet.answers(0)
    assert not fleet.left_out(100.1)[0]
    fleet.sent(0, 10)
    assert fleet.left_out(100.1)[0]
    fleet.first_token(0, 10)
    assert not fleet.left_out(100.1)[0]


def test_replicas_that_stay_keep_what_is_known() -> None:
    """When replicas come and go, those that stay keep their numbers, in whatever row they are then."""
    fleet = FleetView(["a", "b"])
    fleet.take({"b": Report(running=7)}, 10.0)
    fleet.sent(1, 50)
    fleet.keep(["c", "b"])
    assert (fleet.index["b"], fleet.running[1], fleet.in_flight[1], fleet.running[0]) == (1, 7.0, 1.0, 0.0)
    fleet.keep(["b"])
    assert (len(fleet), fleet.running[0]) == (1, 7.0)
