"""Replicas that are to be empty: what is there moves by itself, and its client's tokens are whole."""

import asyncio
from collections import Counter
from http import HTTPStatus
from typing import Any

import pytest

import cluster.core_client
import cluster.replica_poll
from cluster.evacuation import TRIES, least_busy
from cluster.migration import MigrationError
from cluster.move import MoveOutcome, Trigger
from cluster.route import Standing
from replicas.replica import ReplicaStats
from tests.unit.cluster.fake_replicas import request, stats
from tests.unit.cluster.moving_replicas import DEADLINE_S, Client, client


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.replica_poll, "POLL_PERIOD_S", 0.02)
    monkeypatch.setattr(cluster.core_client, "WATCH_PERIOD_S", 0.02)


def counts(one: Client) -> dict[Any, int]:
    return {what: count for what, count in one.core.mover.counts.items() if count}


async def test_a_replica_that_drains_is_emptied_and_gets_nothing_more() -> None:
    async with client() as one:
        await one.core.drain(["a"], on=True)
        await one.until(lambda: "moved here" in one.b.said)
        asks = request("s")
        await one.core.add_request_async(asks)
        await one.check_to_the_end()
        assert counts(one) == {(Trigger.DRAIN, MoveOutcome.MOVED): 1}
        assert one.core.mover.downtimes == 1 and one.core.mover.downtime_s > 0
        assert one.a.said.count("request") == 1 and one.b.said.count("request") == 1


async def test_a_replica_that_may_have_requests_again_gets_them() -> None:
    async with client() as one:
        await one.core.drain(["b"], on=True)
        await one.core.drain(["b"], on=False)
        await one.core.drain(["a"], on=True)
        await one.until(lambda: "moved here" in one.b.said)
        await one.check_to_the_end()


async def test_a_replica_that_ray_serve_ends_is_emptied() -> None:
    """It is in no router's set any more, so that only its channel reaches it."""
    async with client() as one:
        relay = one.core._relays["r"]
        assert relay.route is not None and relay.route.replica is not None
        one.handle.away.add("a")
        relay.route.replica.gone = True
        await one.check_to_the_end()
        assert counts(one) == {(Trigger.STOP, MoveOutcome.MOVED): 1}
        assert (one.core.continued, one.core.retried) == (0, 0)


async def test_what_cannot_move_stays_to_its_end_and_is_listed() -> None:
    async with client() as one:
        params = one.core._relays["r"].request.sampling_params
        assert params is not None
        params.presence_penalty = 0.5
        await one.core.drain(["a"], on=True)
        await one.until(lambda: bool(one.core.stays_at("a")))
        assert "penalty over the answer" in one.core.stays_at("a")["r"]
        assert one.core.stays_at("b") == {}
        await one.check_to_the_end()
        assert one.b.said == [] and counts(one) == {}
        async with asyncio.timeout(DEADLINE_S):
            while one.core._evacuation.stays:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("faults", [{"taken": "on purpose"}, {"push": RuntimeError("on purpose")}])
async def test_what_fails_to_move_is_computed_elsewhere(faults: dict[str, Any]) -> None:
    async with client() as one:
        one.a.faults = faults
        await one.core.drain(["a"], on=True)
        await one.check_to_the_end()
        outcomes = {(Trigger.DRAIN, MoveOutcome.FAILED): TRIES, (Trigger.DRAIN, MoveOutcome.RECOMPUTED): 1}
        assert counts(one) == outcomes
        assert one.b.said[-1] == "request"


async def test_where_the_engine_cannot_push_it_stays() -> None:
    """It is asked once."""
    async with client() as one:
        one.a.pushes = False
        await one.core.drain(["a"], on=True)
        await one.until(lambda: bool(one.core.stays_at("a")))
        assert "cannot move requests" in one.core.stays_at("a")["r"]
        await one.check_to_the_end()
        assert counts(one) == {(Trigger.DRAIN, MoveOutcome.FAILED): 1}
        assert one.b.said == []


async def test_the_last_replica_does_not_drain() -> None:
    async with client() as one:
        one.core.check_drain(["a"])
        for replicas in (["a", "b"], ["b", "a", "c"]):
            with pytest.raises(MigrationError, match="no other replica of m would take requests"):
                one.core.check_drain(replicas)
        await one.core.drain(["a"], on=True)
        await one.until(lambda: any(replica.draining for replica in one.core.replicas))
        with pytest.raises(MigrationError, match="no other replica"):
            one.core.check_drain(["b"])
        await one.check_to_the_end()


async def test_a_replica_that_does_not_answer_is_named() -> None:
    async with client() as one:
        one.handle.away.add("b")
        with pytest.raises(MigrationError, match="b did not answer") as caught:
            await one.core.drain(["b"], on=True)
        assert caught.value.status is HTTPStatus.SERVICE_UNAVAILABLE
        await one.check_to_the_end()


async def test_with_nowhere_to_go_it_stays() -> None:
    """The other one has gone since: the request ends where it is."""
    async with client() as one:
        one.handle.away.add("b")
        await one.until(lambda: len(one.core.replicas) == 1)
        await one.core.drain(["a"], on=True)
        await one.check_to_the_end()
        assert counts(one) == {} and one.b.said == []


def replica(name: str, streams: int, usage: float = 0.0) -> ReplicaStats:
    one = stats(name, streams)
    one.scheduler.kv_cache_usage = usage
    return one


def test_the_least_busy_one_takes_it() -> None:
    few, many = replica("few", 2), replica("many", 5)
    assert least_busy([many, few], {}, "x") == "few"
    assert least_busy([many, few], Counter({"few": 6}), "x") == "many"
    assert least_busy([many, few], {}, "few") == "many"
    assert least_busy([few], {}, "few") is None
    assert least_busy([replica("a", 1, 0.9), replica("b", 1, 0.1)], {}, "x") == "b"
    assert least_busy([], {None: 3}, "x") is None
    assert Standing("a").gone is False
