"""The request router of Ray Serve on replicas that are only names, and the pressure view it follows."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve.request_router import PendingRequest, RunningReplica

import cluster.router
from cluster.cluster_view import EnginePressure, PressureView
from cluster.fleet_view import STALE_AFTER_S, FleetView
from cluster.pressure_view import PressureFollower
from cluster.route import Route
from cluster.router import NotedReplica, PressureRouter
from cluster.routing_policy import RouteRequest
from memory_agent.reports import PressureLevel

DEPLOYMENT = DeploymentID(name="engine:m", app_name="ellm")


def replica(name: str) -> Any:
    """What of Ray Serve's RunningReplica the router looks at."""
    return SimpleNamespace(replica_id=ReplicaID(unique_id=name, deployment_id=DEPLOYMENT), max_ongoing_requests=10)


def request(route: Route | None = None) -> PendingRequest:
    kwargs = {} if route is None else {"route": route}
    return PendingRequest(args=[], kwargs=kwargs, metadata=SimpleNamespace())  # type: ignore[arg-type]


def route() -> Route:
    return Route(RouteRequest(10))


def view(**engines: PressureLevel) -> PressureView:
    return PressureView(1, {name: EnginePressure(level, 0.0, 0.0, 0, 0, 0.0) for name, level in engines.items()})


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> PressureRouter:
    """A router that follows no controller by itself."""
    router = PressureRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA)
    router.initialize_state()
    monkeypatch.setattr(router, "_start", lambda: None)
    return router


async def first(router: PressureRouter, *replicas: Any, to: Route | None = None) -> str:
    ranks = await router.choose_replicas(list(replicas), request(to))
    name: str = ranks[0][0].replica_id.unique_id
    return name


async def test_requests_spread_before_any_is_sent(router: PressureRouter) -> None:
    """Two requests that choose at the same moment go to two idle replicas, not both to the same."""
    a, b = replica("a"), replica("b")
    assert {await first(router, a, b, to=route()), await first(router, a, b, to=route())} == {"a", "b"}


async def test_a_call_that_is_no_request_counts_nowhere(router: PressureRouter) -> None:
    """What asks a replica for its settings is no load."""
    for _ in range(5):
        await first(router, replica("a"), replica("b"))
    assert list(router._dispatcher.fleet.in_flight) == [0, 0]


async def test_a_route_learns_where_it_went(router: PressureRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Serve sends the request to the second best, which accepts: that is where it counts."""
    monkeypatch.setattr(RunningReplica, "try_send_request", lambda self, pr, with_rejection: "result")
    monkeypatch.setattr(RunningReplica, "replica_id", property(lambda self: self.name), raising=False)
    to = route()
    ranks = await router.choose_replicas([replica("a"), replica("b")], request(to))
    second = ranks[1][0].replica_id
    taker = object.__new__(NotedReplica)
    taker.dispatcher, taker.name = router._dispatcher, second  # type: ignore[attr-defined]
    assert taker.try_send_request(request(to), with_rejection=True) == "result"
    router.on_request_routed(request(to), second, None)
    assert to.replica is not None and to.replica.replica_id == second.unique_id
    assert to.chosen_s <= to.sent_s <= to.accepted_s
    assert router._dispatcher.fleet.in_flight[router._dispatcher.fleet.index[second.unique_id]] == 1


async def test_avoids_critical_pressure_and_returns_when_it_is_old(
    router: PressureRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Critical pressure sends every request to the other replica; a view that is too old is not believed any more."""
    a, b = replica("a"), replica("b")
    now_s = 100.0
    monkeypatch.setattr("cluster.router.time.monotonic", lambda: now_s)
    router._follower.take(view(a=PressureLevel.CRITICAL), now_s)
    for _ in range(5):
        assert await first(router, a, b, to=route()) == "b"
    now_s += STALE_AFTER_S + 0.1
    assert await first(router, a, b) == "a"


async def test_every_replica_is_offered_in_some_rank(router: PressureRouter) -> None:
    """A replica that refuses is followed by the next: all are in the answer, one a rank, and Serve is told to back
    off."""
    pending = request(route())
    ranks = await router.choose_replicas([replica("a"), replica("b"), replica("c")], pending)
    assert sorted(rank[0].replica_id.unique_id for rank in ranks) == ["a", "b", "c"]
    assert all(len(rank) == 1 for rank in ranks)
    assert pending.routing_context.should_backoff


async def test_a_replica_that_answers_no_question_is_left_out(
    router: PressureRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas are asked all the time: one that hangs is last soon, without any request on it; one that answers again
    is tried."""
    monkeypatch.setattr(cluster.router, "ASK_PERIOD_S", 0.001)
    monkeypatch.setattr(cluster.router, "ASK_TIMEOUT_S", 0.02)
    a, b = replica("a"), replica("b")
    hangs = asyncio.Event()

    async def queue_len(deadline_s: float) -> int:
        while hangs.is_set():  # noqa: ASYNC110  # whoever hangs tells nobody when it goes on
            await asyncio.sleep(0.001)
        return 0

    a.get_queue_len, b.get_queue_len = queue_len, lambda deadline_s: asyncio.sleep(0, result=0)
    router._replicas = {one.replica_id: one for one in (a, b)}
    await first(router, a, b)
    asking = asyncio.create_task(router._ask_all())
    try:
        hangs.set()
        async with asyncio.timeout(10):
            while not router._dispatcher.fleet.left_out(time.monotonic())[0]:  # noqa: ASYNC110  # plain state
                await asyncio.sleep(0.001)
        assert [await first(router, a, b) for _ in range(4)] == ["b"] * 4
        hangs.clear()
        async with asyncio.timeout(10):
            while await first(router, a, b) != "a":  # noqa: ASYNC110  # likewise
                await asyncio.sleep(0.001)
    finally:
        asking.cancel()


def test_age_of_a_report_counts_from_its_taking() -> None:
    """What was old when the view was made is that much older here."""
    follower, fleet = PressureFollower(), FleetView(["a", "b"])
    old = EnginePressure(PressureLevel.CRITICAL, 1.0, 1.0, 3, 2, age_s=STALE_AFTER_S - 1)
    follower.take(PressureView(1, {"a": old}), now_s=50.0)
    fleet.take(follower.reports, follower.taken_s)
    assert (fleet.level[0], fleet.running[0], fleet.waiting[0]) == (PressureLevel.CRITICAL, 3, 2)
    assert list(fleet.fresh(50.5)) == [True, False]
    assert list(fleet.fresh(51.5)) == [False, False]


async def test_a_replica_that_ray_serve_takes_out_is_gone_for_its_requests(router: PressureRouter) -> None:
    """Those that are on their way to it learn so; one that stays is not."""
    routes = [route(), route()]
    a, b = replica("a"), replica("b")
    router.update_replicas([])
    for one in routes:
        await first(router, a, b, to=one)
    standings = {one.replica.replica_id: one.replica for one in routes if one.replica is not None}
    assert set(standings) == {"a", "b"}
    router._dispatcher.present({"a"})
    assert (standings["a"].gone, standings["b"].gone) == (False, True)
    router.update_replicas([])
    assert standings["a"].gone
    assert await first(router, a, to=route()) == "a"
