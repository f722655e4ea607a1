"""The relay's part of a migration, with two replicas that are played: whatever fails, the client's tokens are whole."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

import cluster.errands
from cluster.core_client import ClusterCore
from cluster.migration import MigrationError
from cluster.mover import Migrated
from cluster.route import Route, Standing
from replicas.channel_wire import InboxAddress
from replicas.hop import Frames, HopCodec
from replicas.migration_words import (
    ANSWER_PARAM,
    ARRIVAL_ARG,
    MOVED_PARAM,
    PUSH_ARG,
    Moved,
    PushAnswer,
    PushOrder,
    arrival,
    push_order,
)
from replicas.output_channel import Channels, Lane
from tests.unit.cluster.fake_replicas import INFO, request, stats

TOKENS = 400
DEADLINE_S = 10.0


class PlayedReplica:
    """Answers "r" with the token that follows the last one of its prompt, counting up. Fails where ``faults`` says so:
    at an order's number, "ahead", "switch", "moved" or "start".

    Attributes:
        said: the orders and the requests that came, in short.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.channels = Channels(name, self._run)
        self.faults: dict[str, Exception | str] = {}
        self.said: list[str] = []
        self.lost = asyncio.Event()
        self._codec = HopCodec()
        self._lanes: dict[str, tuple[Lane, EngineCoreRequest, int]] = {}
        self.gone: set[str] = set()

    async def generate(self, frames: Frames, address: InboxAddress, ticket: int) -> None:
        with self.channels.lane(address, ticket) as lane:
            await self._run(frames, lane)

    async def _run(self, frames: Frames, lane: Lane) -> None:
        asked = self._codec.decode_request(frames)
        if (order := push_order(asked.sampling_params)) is not None:
            self._fail("switch" if order.switch else "end" if order.end else "push")
            lane.put(self._answer(asked.request_id, order))
        elif (word := arrival(asked.sampling_params)) is not None and word.pin:
            assert len(asked.prompt_token_ids or ()) == word.computed + 1
            self.said.append(f"ahead {word.computed}")
            self._fail("ahead")
            lane.put(EngineCoreOutput(asked.request_id, [0], finish_reason=FinishReason.LENGTH))
        else:
            await self._stream(asked, lane, word is not None)
        await lane.ended

    async def _stream(self, asked: EngineCoreRequest, lane: Lane, moved: bool) -> None:
        self.said.append("moved here" if moved else "request")
        self._fail("start")
        assert asked.sampling_params is not None and asked.prompt_token_ids is not None
        token, last = asked.prompt_token_ids[-1], asked.prompt_token_ids[-1] + (asked.sampling_params.max_tokens or 0)
        while token < last and not self.lost.is_set():
            token += 1
            self._lanes[asked.request_id] = lane, asked, token
            reason = FinishReason.LENGTH if token == last else None
            lane.put(EngineCoreOutput(asked.request_id, [token], finish_reason=reason))
            await asyncio.sleep(0.005)
            if asked.request_id in self.gone:
                self.gone.remove(asked.request_id)
                return
        if self.lost.is_set():
            raise ActorDiedError

    def _answer(self, command: str, order: PushOrder) -> EngineCoreOutput:
        answer = PushAnswer()
        if not order.end and order.request_id not in self._lanes:
            answer = PushAnswer(error="it has finished")
        elif order.switch and "switch" not in self.faults:
            lane, _, token = self._lanes.pop(order.request_id)
            self.gone.add(order.request_id)
            computed = token - 1  # the prompt is 1, 2, 3
            moved = {MOVED_PARAM: asdict(Moved("there", order.move, computed))}
            last = EngineCoreOutput(order.request_id, [], finish_reason=FinishReason.ABORT, kv_transfer_params=moved)
            lane.put(last)
            if self.faults.get("after the switch") == "dies":
                self.lost.set()
        elif not order.end:
            token = self._lanes[order.request_id][2]
            blocks = (token - 1) // INFO.block_tokens
            answer = PushAnswer(staged=blocks, ready=blocks, origin="there")
        self.said.append("end" if order.end else "switch" if order.switch else f"taken {order.taken}")
        if (error := self.faults.get(self.said[-1].split()[0])) is not None:
            answer = PushAnswer(error=str(error))
        output = EngineCoreOutput(command, [], finish_reason=FinishReason.STOP)
        output.kv_transfer_params = {ANSWER_PARAM: asdict(answer)}
        return output

    def _fail(self, what: str) -> None:
        fault = self.faults.get(what)
        if isinstance(fault, Exception):
            raise fault


class Handle:
    """Over both replicas: the one that the route wants, or the first that is not lost."""

    def __init__(self, *replicas: PlayedReplica) -> None:
        self.replicas = {replica.name: replica for replica in replicas}

    def options(self, *, method_name: str) -> "Handle":
        return self

    def remote(self, frames: Frames, address: InboxAddress, ticket: int, route: Route) -> "asyncio.Task[None]":
        there = [one for one in self.replicas.values() if not one.lost.is_set()]
        replica = self.replicas[route.to] if route.to is not None else there[0]
        route.replica = Standing(replica.name)
        return asyncio.get_running_loop().create_task(replica.generate(frames, address, ticket))

    def broadcast(self, *args: object) -> "Handle":
        return self

    async def results_async(self, **kwargs: object) -> list[Any]:
        return [stats(name) for name in self.replicas]


class Client:
    """The request "r" and all that has come of it."""

    def __init__(self, core: ClusterCore, a: PlayedReplica, b: PlayedReplica) -> None:
        self.core, self.a, self.b = core, a, b
        self.outputs: list[EngineCoreOutput] = []

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.outputs for token in output.new_token_ids]

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not done():
                self.outputs += (await self.core.get_output_async()).outputs

    async def migrate(self, request_id: str = "r", to: str = "b") -> Migrated:
        """While the client reads on."""
        reading = asyncio.create_task(self.until(lambda: False))
        try:
            return await self.core.migrate(request_id, to)
        finally:
            reading.cancel()

    async def check_to_the_end(self) -> None:
        """No token twice, none missing, one end."""
        await self.until(lambda: bool(self.outputs) and self.outputs[-1].finished)
        assert self.tokens == list(range(4, 4 + TOKENS))
        assert [output.finish_reason for output in self.outputs if output.finished] == [FinishReason.LENGTH]
        assert all(output.kv_transfer_params is None for output in self.outputs)
        assert not self.core._errands


@asynccontextmanager
async def client() -> AsyncIterator[Client]:
    a, b = PlayedReplica("a"), PlayedReplica("b")
    core = ClusterCore("m", Handle(a, b), INFO, replicas=2, replica_limit=4)  # type: ignore[arg-type]
    await core.open("127.0.0.1")
    try:
        async with asyncio.timeout(DEADLINE_S):
            while len(core.replica_numbers) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        asks = request()
        assert asks.sampling_params is not None
        asks.sampling_params.max_tokens = TOKENS
        await core.add_request_async(asks)
        one = Client(core, a, b)
        await one.until(lambda: len(one.tokens) > 40)
        yield one
    finally:
        core.shutdown()
        a.channels.close()
        b.channels.close()


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
        one.b.faults = {"start": ActorDiedError()}
        moving = asyncio.create_task(one.core.migrate("r", "b"))
        await one.until(lambda: "moved here" in one.b.said)
        one.b.faults = {}
        await one.check_to_the_end()
        await asyncio.wait([moving], timeout=DEADLINE_S)
        moving.exception()
        assert one.core.continued == 1


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
