"""The relay's part of a migration, with two replicas that are played: whatever fails, the client's tokens are whole."""

import asyncio

import pytest
from ray.exceptions import ActorDiedError
from vllm.sampling_params import SamplingParams

import cluster.errands
from cluster.migration import MigrationError
from cluster.move import Migrated
from replicas.migration_words import (
    ARRIVAL_ARG,
    PUSH_ARG,
)
from tests.unit.cluster.fake_replicas import request
from tests.unit.cluster.moving_replicas import DEADLINE_S, client


async def test_the_stream_goes_on_at_the_destination() -> None:
    async with client() as one:
        moved = await one.migrate()
        assert (moved.source, moved.destination) == ("a", "b")
        assert moved.blocks_ahead >= 2
        assert one.a.said[:2] == ["request", "taken 0"]
        assert one.a.said[-2:] == ["switch", "end"]
        assert one.b.said[0].startswith("ahead ")
        await one.check_to_the_end()
        assert one.b.said[-1] == "moved here"
        assert (one.core.mover.moved, one.core.continued, one.core.retried) == (1, 0, 0)


@pytest.mark.parametrize("what", ["push", "switch"])
@pytest.mark.parametrize("how", ["raises", "refuses"])
async def test_a_source_that_fails_keeps_the_request(what: str, how: str) -> None:
    async with client() as one:
        one.a.faults = (
            {what: RuntimeError("on purpose")}
            if how == "raises"
            else {"taken" if what == "push" else what: "on purpose"}
        )
        with pytest.raises(MigrationError, match="on purpose"):
            await one.migrate()
        assert one.a.said[-1] == "end"
        one.a.faults = {}
        await one.check_to_the_end()
        assert "moved here" not in one.b.said


async def test_a_destination_that_fails_ahead_leaves_the_request_at_its_source() -> None:
    async with client() as one:
        one.b.faults = {"ahead": RuntimeError("on purpose")}
        with pytest.raises(MigrationError, match="on purpose"):
            await one.migrate()
        await one.check_to_the_end()
        assert "switch" not in one.a.said


async def test_a_destination_that_does_not_answer_leaves_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.errands, "ERRAND_S", 0.05)
    async with client() as one:
        one.b.generate = lambda *args: asyncio.sleep(60)  # type: ignore[method-assign,assignment]
        with pytest.raises(MigrationError, match="full, or does not answer"):
            await one.migrate()
        await one.check_to_the_end()


async def test_a_destination_that_dies_after_the_switch_is_continued_elsewhere() -> None:
    async with client() as one:
        await one.outlive_its_destination()


async def test_a_source_that_dies_after_the_switch_is_not_missed() -> None:
    async with client() as one:
        one.a.faults = {"after the switch": "dies"}
        assert (await one.migrate()).destination == "b"
        await one.check_to_the_end()
        assert one.core.continued == 0


async def test_a_source_that_dies_before_the_switch_is_continued() -> None:
    async with client() as one:
        one.a.lost.set()
        one.a.faults = {"push": ActorDiedError(), "end": ActorDiedError()}
        with pytest.raises(MigrationError):
            await one.migrate()
        await one.check_to_the_end()
        assert one.core.continued == 1


async def test_a_client_that_goes_away_ends_the_migration() -> None:
    async with client() as one:
        moving = asyncio.create_task(one.migrate())
        await asyncio.sleep(0.01)
        await one.core.abort_requests_async(["r"])
        await asyncio.wait([moving], timeout=DEADLINE_S)
        moving.exception()
        assert one.a.said[-1] == "end"
        assert not one.core._errands


async def test_what_cannot_be_moved_says_why() -> None:
    async with client() as one:
        for request_id, to, why in (
            ("x", "b", "no request x runs here"),
            ("r", "a", "is at a already"),
            ("r", "c", "m has no replica c; it has a, b"),
        ):
            with pytest.raises(MigrationError, match=why):
                await one.core.migrate(request_id, to)
        relay = one.core._relays["r"]
        assert relay.request.sampling_params is not None
        relay.request.sampling_params.presence_penalty = 0.5
        with pytest.raises(MigrationError, match="penalty over the answer"):
            await one.core.migrate("r", "b")
        relay.request.sampling_params.presence_penalty = 0.0
        both = await asyncio.gather(one.migrate(), one.core.migrate("r", "b"), return_exceptions=True)
        assert isinstance(both[0], Migrated)
        assert "is being moved to b already" in str(both[1])
        await one.check_to_the_end()
        with pytest.raises(MigrationError, match="has finished"):
            await one.core.migrate("r", "b")


async def test_a_client_cannot_speak_of_migrations() -> None:
    async with client() as one:
        asks = request("s")
        assert asks.sampling_params is not None
        asks.sampling_params.extra_args = {PUSH_ARG: {"request_id": "r", "move": "x"}, ARRIVAL_ARG: {}, "mine": 1}
        await one.core.add_request_async(asks)
        await one.until(lambda: any(output.request_id == "s" for output in one.outputs))
        assert asks.sampling_params.extra_args == {"mine": 1}
        assert one.a.said == ["request", "request"]
        assert isinstance(asks.sampling_params, SamplingParams)
