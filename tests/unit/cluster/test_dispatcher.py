"""How the router of one process counts and chooses, without Ray Serve around it."""

import math
import pickle
import random

import pytest

from cluster.cluster_view import EnginePressure
from cluster.dispatcher import Dispatcher
from cluster.route import Route
from cluster.routing_policy import RouteRequest
from memory_agent.reports import PressureLevel

NOW_S = 100.0


@pytest.fixture
def dispatcher() -> Dispatcher:
    return Dispatcher(random.Random(0))


def route(tokens: int = 100, prefix: tuple[int, ...] = ()) -> Route:
    return Route(RouteRequest(tokens, prefix))


def choose(dispatcher: Dispatcher, one: Route | None = None, ids: str = "ab", now_s: float = NOW_S) -> str:
    """The best of the replicas that are named by one letter each; where one is given the route goes there."""
    dispatcher.look_at(list(ids), {}, -math.inf)
    best = dispatcher.choose(one, now_s)[0]
    if one is not None:
        dispatcher.sent(one, best, now_s)
    return best


def in_flight(dispatcher: Dispatcher) -> dict[str, float]:
    dispatcher.look_at(dispatcher.fleet.ids, {}, -math.inf)
    return dict(zip(dispatcher.fleet.ids, dispatcher.fleet.in_flight, strict=True))


def test_requests_that_choose_together_spread(dispatcher: Dispatcher) -> None:
    """A choice counts at once, before it is sent."""
    dispatcher.look_at(["a", "b"], {}, -math.inf)
    assert {dispatcher.choose(route(), NOW_S)[0], dispatcher.choose(route(), NOW_S)[0]} == {"a", "b"}


def test_a_request_counts_until_its_end(dispatcher: Dispatcher) -> None:
    """What the core tells is known at the next choice: the prompt is pending until the first token, the request until
    it ends; a second end changes nothing."""
    one = route(70)
    name = choose(dispatcher, one)
    row = dispatcher.fleet.index[name]
    assert (in_flight(dispatcher)[name], dispatcher.fleet.pending_tokens[row]) == (1, 70)
    one.first_token()
    assert (in_flight(dispatcher)[name], dispatcher.fleet.pending_tokens[row]) == (1, 0)
    one.ended(5)
    one.ended(5)
    assert in_flight(dispatcher) == {"a": 0, "b": 0}


def test_an_end_without_a_token_takes_the_prompt_along(dispatcher: Dispatcher) -> None:
    """An aborted request leaves no pending tokens behind."""
    one = route()
    choose(dispatcher, one)
    one.ended(0)
    in_flight(dispatcher)
    assert dispatcher.fleet.pending_tokens.sum() == 0


def test_where_serve_sends_it_elsewhere_it_counts_there(dispatcher: Dispatcher) -> None:
    """The best replica was full: the request counts on the one that took it, once."""
    one = route()
    best = choose(dispatcher, one)
    other = "b" if best == "a" else "a"
    dispatcher.sent(one, other, NOW_S)
    assert in_flight(dispatcher) == {best: 0, other: 1}
    assert one.replica is not None and one.replica.replica_id == other


def test_choosing_again_moves_the_request(dispatcher: Dispatcher) -> None:
    """Every replica has refused, Ray Serve asks again: the request still counts once, and is not taken for sent."""
    one = route()
    choose(dispatcher, one)
    dispatcher.accepted(one, NOW_S)
    dispatcher.look_at(["a", "b"], {}, -math.inf)
    dispatcher.choose(one, NOW_S + 1)
    assert sum(in_flight(dispatcher).values()) == 1
    assert math.isnan(one.sent_s) and math.isnan(one.accepted_s)


def test_what_ended_before_it_was_chosen_counts_nowhere(dispatcher: Dispatcher) -> None:
    """A client that goes away while its request waits for a replica leaves no count behind."""
    one = route()
    one.ended(0)
    choose(dispatcher, one)
    assert in_flight(dispatcher) == {"a": 0, "b": 0}


def test_news_of_a_replica_that_is_gone_is_passed_over(dispatcher: Dispatcher) -> None:
    """Its requests end after it; the others' counts stay theirs."""
    one, two = route(), route()
    gone = choose(dispatcher, one)
    kept = choose(dispatcher, two)
    dispatcher.look_at([kept], {}, -math.inf)
    one.failed()
    one.ended(0)
    assert in_flight(dispatcher) == {kept: 1}
    assert gone not in dispatcher.fleet.index
    two.ended(1)
    assert in_flight(dispatcher) == {kept: 0}


def test_a_failed_replica_is_left_out_and_taken_back_by_one_request(dispatcher: Dispatcher) -> None:
    """After a failure everything goes elsewhere; when the time is over one request goes there, and its first token
    brings the replica back."""
    one = route()
    bad = choose(dispatcher, one)
    one.failed()
    one.ended(0)
    failed_s = dispatcher._news[0][2]
    good = "b" if bad == "a" else "a"
    busy = [route() for _ in range(6)]
    assert {choose(dispatcher, each, now_s=failed_s + 0.5) for each in busy} == {good}
    trial = route()
    assert choose(dispatcher, trial, now_s=failed_s + 1.5) == bad
    assert choose(dispatcher, now_s=failed_s + 1.5) == good
    trial.first_token()
    assert choose(dispatcher, now_s=failed_s + 1.5) == bad


def test_a_silent_replica_is_left_out_until_it_answers(dispatcher: Dispatcher) -> None:
    """One that answers no question gets no request; what is there already can see since when. It answers: one request
    may try."""
    one = route()
    bad = choose(dispatcher, one)
    good = "b" if bad == "a" else "a"
    dispatcher.silent(bad, NOW_S, NOW_S + 2)
    dispatcher.silent(bad, NOW_S + 3, NOW_S + 5)
    assert one.replica is not None and one.replica.silent_since_s == NOW_S
    assert {choose(dispatcher, route(), now_s=NOW_S + 5.5) for _ in range(3)} == {good}
    dispatcher.answers(bad)
    assert one.replica.silent_since_s == math.inf
    assert [choose(dispatcher, route(), now_s=NOW_S + 5.5) for _ in range(2)] == [bad, good]


def test_reports_count(dispatcher: Dispatcher) -> None:
    """A replica that others have loaded is avoided, though this process has sent nothing there."""
    report = EnginePressure(PressureLevel.NORMAL, 0.0, 0.0, running=9, waiting=0, age_s=0.0)
    dispatcher.look_at(["a", "b"], {"a": report}, NOW_S)
    assert dispatcher.choose(None, NOW_S)[0] == "b"


def test_without_replicas_there_is_no_choice(dispatcher: Dispatcher) -> None:
    """Ray Serve waits for one."""
    dispatcher.look_at([], {}, -math.inf)
    assert dispatcher.choose(route(), NOW_S) == []


def test_a_route_stays_in_its_process() -> None:
    """What travels to the replica in its place is None."""
    assert pickle.loads(pickle.dumps(route())) is None
