"""How the router of one process counts and chooses, without Ray Serve around it."""

import math
import pickle
import random
from collections import Counter
from dataclasses import replace

import pytest

from cluster.cluster_view import EnginePressure
from cluster.dispatcher import Dispatcher, RoutingSettings
from cluster.fleet_view import STALE_AFTER_S
from cluster.prompt_prefix import PREFIX_TOKENS
from cluster.route import Route
from cluster.routing_policy import RouteRequest
from memory_agent.reports import PressureLevel
from replicas.step_time import StepTime

NOW_S = 100.0


@pytest.fixture
def dispatcher() -> Dispatcher:
    return Dispatcher(RoutingSettings(), random.Random(0))


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


LEARNED = EnginePressure(
    PressureLevel.NORMAL,
    kv_usage=0.0,
    demand_ratio=0.0,
    running=4,
    waiting=0,
    age_s=0.0,
    kv_tokens=100_000,
    max_num_seqs=64,
    max_num_batched_tokens=2048,
    step_time=StepTime(0.01, 1e-4, 1e-7, 1e-4, 0.0),
)
"""An engine that has learned what its steps take."""


def with_reports(settings: RoutingSettings, seed: int = 0, ids: str = "ab", **running: int) -> Dispatcher:
    """All replicas have reported, four requests running but where ``running`` says otherwise."""
    one = Dispatcher(settings, random.Random(seed))
    reports = {name: replace(LEARNED, running=running.get(name, 4)) for name in ids}
    one.look_at(list(ids), reports, NOW_S)
    return one


PROMPT = tuple(range(20))


def test_a_prompt_goes_where_its_beginning_has_been_computed() -> None:
    """Shared prefixes meet, though the replica is a little busier for it; other prompts go elsewhere."""
    one = with_reports(RoutingSettings())
    first = route(20 * PREFIX_TOKENS, PROMPT)
    home = one.choose(first, NOW_S)[0]
    away = "b" if home == "a" else "a"
    assert one.choose(route(20 * PREFIX_TOKENS, (99, 98)), NOW_S)[0] == away
    first.first_token()
    one.look_at(one.fleet.ids, {}, NOW_S)
    again = route(21 * PREFIX_TOKENS, (*PROMPT, 77))
    assert one.choose(again, NOW_S)[0] == home
    assert again.tokens == PREFIX_TOKENS
    assert again.predicted_ttft_s < first.predicted_ttft_s
    assert 0 < again.predicted_tpot_s < 1


def test_prefixes_stay_with_their_replicas_when_others_come_and_go() -> None:
    """A new replica that sorts before all others takes nobody's cache."""
    one = with_reports(RoutingSettings())
    home = one.choose(route(20 * PREFIX_TOKENS, PROMPT), NOW_S)[0]
    reports = {name: replace(LEARNED, age_s=-0.1) for name in "ABab"}
    one.look_at(["B", "A", "b", "a"], reports, NOW_S + 0.1)
    assert one.choose(route(20 * PREFIX_TOKENS, PROMPT), NOW_S)[0] == home
    one.look_at([name for name in "ABab" if name != home], reports, NOW_S + 0.1)
    fresh = route(20 * PREFIX_TOKENS, PROMPT)
    one.choose(fresh, NOW_S)
    assert fresh.tokens == 20 * PREFIX_TOKENS


@pytest.mark.parametrize("why", ["load is configured", "nobody has learned", "reports are old"])
def test_where_nothing_is_predicted_load_decides(why: str) -> None:
    """Traffic goes on by load alone when prediction is off, or the controller and with it the reports are gone."""
    settings = RoutingSettings(policy="load" if why == "load is configured" else "predicted")
    one = Dispatcher(settings, random.Random(0))
    report = replace(LEARNED, running=0, step_time=None) if why == "nobody has learned" else replace(LEARNED, running=0)
    one.look_at(["a", "b"], {"a": report, "b": report}, NOW_S)
    now_s = NOW_S + (STALE_AFTER_S + 1 if why == "reports are old" else 0)
    chosen = [route(20 * PREFIX_TOKENS, PROMPT) for _ in range(6)]
    assert Counter(one.choose(each, now_s)[0] for each in chosen) == {"a": 3, "b": 3}
    assert all(math.isnan(each.predicted_ttft_s) for each in chosen)


@pytest.mark.parametrize("policy", ["predicted", "load"])
def test_many_routers_do_not_herd_to_one_replica(policy: str) -> None:
    """Forty processes have the same snapshot, in which one of forty replicas is idle: it gets some of the requests that
    come at that moment and not all, while a process alone sends it the first."""
    ids = "".join(chr(ord("0") + n) for n in range(40))
    settings = RoutingSettings(policy=policy, routers=40)  # type: ignore[arg-type]
    routers = [with_reports(settings, seed, ids, **{"7": 0}) for seed in range(40)]
    share = Counter(one.choose(route(1000), NOW_S)[0] for one in routers)
    assert max(share.values()) <= 8
    alone = with_reports(replace(settings, routers=1), 0, ids, **{"7": 0})
    assert alone.choose(route(1000), NOW_S)[0] == "7"


def test_requests_without_targets_have_those_of_the_settings() -> None:
    """A busy replica that holds the prompt is good enough for patient requests, and not for hasty ones."""
    chosen = {}
    for tpot_ms in (11.0, 10_000.0):
        one = with_reports(RoutingSettings(ttft_ms=1000.0, tpot_ms=tpot_ms), a=40, b=0)
        one._index.insert(PROMPT, one.fleet.index["a"])
        chosen[tpot_ms] = one.choose(route(20 * PREFIX_TOKENS, PROMPT), NOW_S)[0]
    assert chosen == {11.0: "b", 10_000.0: "a"}


def test_a_replica_that_drains_gets_nothing_while_there_is_another(dispatcher: Dispatcher) -> None:
    """The set is the core's own: what it says when the choice is made counts. An errand reaches it all the same."""
    shut = {"a"}
    dispatcher.look_at(["a", "b"], {}, -math.inf)
    draining = [Route(RouteRequest(1), shut=shut) for _ in range(4)]
    assert [dispatcher.choose(one, NOW_S) for one in draining] == [["b"]] * 4
    assert dispatcher.choose(Route(RouteRequest(1), to="a", only=True, shut=shut), NOW_S) == ["a"]
    shut.add("b")
    assert set(dispatcher.choose(Route(RouteRequest(1), shut=shut), NOW_S)) == {"a", "b"}
    shut.clear()
    assert dispatcher.choose(draining[0], NOW_S)[0] == "a"
