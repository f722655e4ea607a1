"""Requests leave a replica that is full as the controller orders, each once, and their clients' tokens are whole."""

import asyncio
from typing import Any

import pytest

from cluster.move import MoveOutcome, Trigger
from cluster.move_planner import MoveOrder
from cluster.relief import Relief
from tests.unit.cluster.fake_replicas import request
from tests.unit.cluster.moving_replicas import DEADLINE_S, Client, client


def order(number: int = 1, source: str = "a", destination: str = "b", **changes: Any) -> MoveOrder:
    terms = {"trigger": Trigger.EXHAUSTION, "tokens": 10, "room_tokens": 100_000, "queued": False} | changes
    return MoveOrder(number, source, destination, **terms)


def counts(one: Client) -> dict[Any, int]:
    return {what: count for what, count in one.core.mover.counts.items() if count}


async def test_a_running_request_moves_with_its_kv_and_once_for_an_order() -> None:
    async with client() as one:
        for _ in range(3):
            one.core.relieve([order()])
        await one.until(lambda: "moved here" in one.b.said)
        one.core.relieve([order(2, "b", "a")])  # it has just come: it stays
        await one.check_to_the_end()
        assert counts(one) == {(Trigger.EXHAUSTION, MoveOutcome.MOVED): 1}
        assert one.a.said.count("request") == 1 and "moved here" not in one.a.said


async def test_a_request_without_a_token_waits_elsewhere() -> None:
    """Nothing is copied, and nobody is blamed: neither its retries nor the replica's standing suffer."""
    async with client() as one:
        one.a.holds = True
        await one.core.add_request_async(request("w"))
        async with asyncio.timeout(DEADLINE_S):
            while one.a.said.count("request") < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        relay = one.core._relays["w"]
        one.core.relieve([order(queued=True, trigger=Trigger.FRAGMENTATION)])
        await one.until(lambda: any(output.request_id == "w" for output in one.outputs))
        assert one.b.said == ["request"]
        assert (relay.attempts, relay.retries_left, relay.wanted) == (1, 2, None)
        assert counts(one) == {(Trigger.FRAGMENTATION, MoveOutcome.REROUTED): 1}
        assert (one.core.retried, one.core.continued) == (0, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "b", "destination": "a"},
        {"destination": "c"},
        {"source": "c"},
        {"room_tokens": 2},
    ],
)
async def test_orders_that_are_not_for_it_change_nothing(changes: dict[str, Any]) -> None:
    async with client() as one:
        one.core.relieve([order(**changes)])
        await one.check_to_the_end()
        assert counts(one) == {}


async def test_nothing_goes_to_a_replica_that_drains() -> None:
    async with client() as one:
        await one.core.drain(["b"], on=True)
        one.core.relieve([order()])
        await one.check_to_the_end()
        assert counts(one) == {}


async def test_what_cannot_be_carried_stays() -> None:
    async with client() as one:
        params = one.core._relays["r"].request.sampling_params
        assert params is not None
        params.presence_penalty = 0.5
        one.core.relieve([order()])
        await one.check_to_the_end()
        assert counts(one) == {}


async def test_an_engine_that_cannot_move_is_asked_once() -> None:
    async with client() as one:
        one.a.pushes = False
        one.core.relieve([order()])
        await one.until(lambda: bool(counts(one)))
        one.core._relief._went_s.clear()
        one.core.relieve([order(2)])
        await one.check_to_the_end()
        assert counts(one) == {(Trigger.EXHAUSTION, MoveOutcome.FAILED): 1}
        assert sum(said.startswith("taken") for said in one.a.said) == 1


async def test_each_process_obeys_its_part() -> None:
    """Of many orders, about as many as its share says; all of them where it is the only one."""

    async def obeyed(share: float) -> int:
        begun: list[MoveOrder] = []
        relief = Relief(None, {}, lambda relay, why: None, lambda replica: True, share)  # type: ignore[arg-type]
        relief._begin = begun.append  # type: ignore[method-assign]
        relief.obey(order(number) for number in range(1, 1001))
        return len(begun)

    assert await obeyed(1.0) == 1000
    assert 150 < await obeyed(0.25) < 350
