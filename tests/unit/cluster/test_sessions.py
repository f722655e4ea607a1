"""Requests of a session go where the ones before went, as long as that is no harm."""

import random

import pytest

from cluster.dispatcher import Dispatcher, RoutingSettings
from cluster.route import Route
from cluster.routing_policy import RouteRequest
from cluster.sessions import Session, Sessions

IDS = [f"r{at}" for at in range(8)]
MINE: Session = ("acme", "s")


def dispatcher(seed: int = 0, routers: int = 1) -> Dispatcher:
    made = Dispatcher(RoutingSettings("load", routers), random.Random(seed))
    made.look_at(IDS, {}, 0.0)
    return made


def send(to: Dispatcher, session: Session | None = MINE, now_s: float = 1.0) -> tuple[Route, str]:
    route = Route(RouteRequest(100, session=session))
    return route, to.choose(route, now_s)[0]


@pytest.mark.parametrize("routers", [1, 8])
def test_a_session_stays(routers: int) -> None:
    """Among idle replicas, where chance decides otherwise, and though each router looks at a part of them only."""
    for seed in range(20):
        to = dispatcher(seed, routers)
        first = send(to)[1]
        others = {send(to, ("acme", f"{at}"))[1] for at in range(20)}
        assert len(others) > 1
        assert send(to)[1] == first


def test_a_busy_replica_keeps_no_session() -> None:
    """It moves when many more requests are there than elsewhere, and then stays where it went."""
    to = dispatcher()
    home = send(to)[1]
    for _ in range(60):
        chosen = send(to)[1]
        if chosen != home:
            break
    assert chosen != home
    assert send(to)[1] == chosen


def test_a_replica_that_fails_or_is_gone_keeps_no_session() -> None:
    """The next request goes elsewhere, and so do those after it."""
    to = dispatcher()
    route, home = send(to)
    route.failed()
    to.look_at(IDS, {}, 0.0)
    moved = send(to)[1]
    assert moved != home
    to.look_at([one for one in IDS if one != moved], {}, 0.0)
    assert send(to)[1] != moved


def test_a_session_follows_where_ray_serve_sends_it() -> None:
    """What counts is who got the request, not who was to get it."""
    to = dispatcher()
    route, first = send(to)
    other = next(one for one in IDS if one != first)
    to.sent(route, other, 1.0)
    assert send(to)[1] == other


def test_tenants_do_not_share_sessions() -> None:
    """The same id of two tenants are two sessions."""
    known = Sessions()
    known.sent(("a", "s"), "r1")
    assert (known.replica(("a", "s")), known.replica(("b", "s"))) == ("r1", None)


def test_sessions_without_end_are_not_kept() -> None:
    """The least recently used ones are forgotten."""
    known = Sessions(most=3)
    for at in range(5):
        known.sent(("a", "kept"), "r0")
        known.sent(("a", str(at)), "r1")
    assert known.replica(("a", "kept")) == "r0"
    assert [known.replica(("a", str(at))) for at in range(5)] == [None, None, None, "r1", "r1"]
