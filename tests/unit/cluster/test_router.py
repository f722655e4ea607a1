"""The request router on replicas that are only names, and the pressure view it follows."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve.request_router import PendingRequest

from cluster.cluster_view import EnginePressure, PressureView
from cluster.fleet_view import STALE_AFTER_S, FleetView
from cluster.pressure_view import PressureFollower
from cluster.router import PressureRouter
from memory_agent.reports import PressureLevel

DEPLOYMENT = DeploymentID(name="engine:m", app_name="ellm")


def replica(name: str) -> Any:
    """What of Ray Serve's RunningReplica the router looks at."""
    return SimpleNamespace(replica_id=ReplicaID(unique_id=name, deployment_id=DEPLOYMENT), max_ongoing_requests=10)


def view(**engines: PressureLevel) -> PressureView:
    return PressureView(1, {name: EnginePressure(level, 0.0, 0.0, 0, 0, 0.0) for name, level in engines.items()})


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> PressureRouter:
    """A router that follows no controller by itself."""
    router = PressureRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA)
    router.initialize_state()
    monkeypatch.setattr(router._follower, "start", lambda: None)
    return router


async def first(router: PressureRouter, *replicas: Any, request: PendingRequest | None = None) -> str:
    ranks = await router.choose_replicas(list(replicas), request)
    name: str = ranks[0][0].replica_id.unique_id
    return name


async def test_requests_spread_before_any_is_sent(router: PressureRouter) -> None:
    """Two requests that choose at the same moment go to two idle replicas, not both to the same."""
    a, b = replica("a"), replica("b")
    assert {await first(router, a, b), await first(router, a, b)} == {"a", "b"}


async def test_counts_what_is_in_flight(router: PressureRouter) -> None:
    """A replica is busier from the sending of a request until its end."""
    a, b = replica("a"), replica("b")
    router.on_send_request(a.replica_id)
    assert await first(router, a, b) == "b"
    router.on_send_request(b.replica_id)
    router.on_send_request(b.replica_id)
    assert await first(router, a, b) == "a"
    router.on_request_completed(b.replica_id, "1")
    router.on_request_completed(b.replica_id, "2")
    assert await first(router, a, b) == "b"


async def test_more_ends_than_beginnings_do_not_attract(router: PressureRouter) -> None:
    """An end that was never counted as a beginning leaves the count at zero."""
    a, b = replica("a"), replica("b")
    for number in range(5):
        router.on_request_completed(a.replica_id, str(number))
    router.on_send_request(a.replica_id)
    assert await first(router, a, b) == "b"


async def test_avoids_critical_pressure_and_returns_when_it_is_old(
    router: PressureRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Critical pressure sends every request to the other replica; a view that is too old is not believed any more."""
    a, b = replica("a"), replica("b")
    now_s = 100.0
    monkeypatch.setattr("cluster.router.time.monotonic", lambda: now_s)
    router._follower.take(view(a=PressureLevel.CRITICAL), now_s)
    for _ in range(5):
        assert await first(router, a, b) == "b"
        router.on_send_request(b.replica_id)
    now_s += STALE_AFTER_S + 0.1
    assert await first(router, a, b) == "a"


async def test_every_replica_is_offered_in_some_rank(router: PressureRouter) -> None:
    """A replica that refuses is followed by the next: all are in the answer, one a rank, and Serve is told to back
    off."""
    request = PendingRequest(args=[], kwargs={}, metadata=SimpleNamespace())  # type: ignore[arg-type]
    ranks = await router.choose_replicas([replica("a"), replica("b"), replica("c")], request)
    assert sorted(rank[0].replica_id.unique_id for rank in ranks) == ["a", "b", "c"]
    assert all(len(rank) == 1 for rank in ranks)
    assert request.routing_context.should_backoff


def test_age_of_a_report_counts_from_its_taking() -> None:
    """What was old when the view was made is that much older here."""
    follower, fleet = PressureFollower(), FleetView(["a", "b"])
    old = EnginePressure(PressureLevel.CRITICAL, 1.0, 1.0, 3, 2, age_s=STALE_AFTER_S - 1)
    follower.take(PressureView(1, {"a": old}), now_s=50.0)
    fleet.take(follower.reports, follower.taken_s)
    assert (fleet.level[0], fleet.running[0], fleet.waiting[0]) == (PressureLevel.CRITICAL, 3, 2)
    assert list(fleet.fresh(50.5)) == [True, False]
    assert list(fleet.fresh(51.5)) == [False, False]
