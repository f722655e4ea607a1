"""Two replicas that are played, between which a request moves, over a core and real output channels."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import Any

from ray.exceptions import ActorDiedError
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from cluster.core_client import ClusterCore
from cluster.crossing import CallAgent
from cluster.move import Migrated
from cluster.route import Route, Standing
from replicas.channel_wire import InboxAddress
from replicas.hop import Frames, HopCodec
from replicas.migration_words import (
    ANSWER_PARAM,
    MOVED_PARAM,
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
LAST = "1a" * 32


class PlayedReplica:
    """Answers "r" with the token that follows the last one of its prompt, counting up. Fails where ``faults`` says so:
    at an order's number, "ahead", "switch", "moved" or "start".

    Attributes:
        said: the orders and the requests that came, in short. pushes: its engine knows orders.
        found: where its requests were told to look for KV, and for how many tokens.
        holds: requests get no token from now on, but those that have one.
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
        self.pushes = True
        self.found: list[tuple[str, int]] = []
        self.holds = False

    async def generate(self, frames: Frames, address: InboxAddress, ticket: int) -> None:
        with self.channels.lane(address, ticket) as lane:
            await self._run(frames, lane)

    async def _run(self, frames: Frames, lane: Lane) -> None:
        asked = self._codec.decode_request(frames)
        if (order := push_order(asked.sampling_params)) is not None:
            self._fail("switch" if order.switch else "end" if order.end else "push")
            answer = self._answer(asked.request_id, order)
            lane.put(
                answer if self.pushes else EngineCoreOutput(answer.request_id, [], finish_reason=FinishReason.STOP)
            )
        elif (word := arrival(asked.sampling_params)) is not None and word.pin:
            assert len(asked.prompt_token_ids or ()) == word.computed + 1
            self.said.append(f"ahead {word.computed}")
            self.found.append((word.origin, word.computed))
            self._fail("ahead")
            lane.put(EngineCoreOutput(asked.request_id, [0], finish_reason=FinishReason.LENGTH))
        else:
            self.found += [(word.origin, word.computed)] if word is not None else []
            await self._stream(asked, lane, word is not None)
        await lane.ended

    async def _stream(self, asked: EngineCoreRequest, lane: Lane, moved: bool) -> None:
        self.said.append("moved here" if moved else "request")
        self._fail("start")
        assert asked.sampling_params is not None and asked.prompt_token_ids is not None
        if self.holds:
            await lane.ended
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
            moved = {MOVED_PARAM: asdict(Moved("there", order.move, computed, LAST))}
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
    """Over both replicas: the one that the route wants, or the first that is not lost and takes requests.

    Attributes:
        away: Ray Serve has taken them out of its set.
        agents: of their nodes, by name; "" for none.
    """

    def __init__(self, *replicas: PlayedReplica) -> None:
        self.replicas = {replica.name: replica for replica in replicas}
        self.draining: set[str] = set()
        self.away: set[str] = set()
        self.asked = ""
        self.agents: dict[str, str] = {}

    def options(self, *, method_name: str) -> "Handle":
        return self

    def remote(
        self, frames: Frames, address: InboxAddress, ticket: int, route: Route, mark: None
    ) -> "asyncio.Task[None]":
        there = [one for one in self.replicas.values() if not one.lost.is_set() and one.name not in self.away]
        replica = self.replicas[route.to] if route.to is not None else there[0]
        if route.to is None:
            replica = next((one for one in there if one.name not in route.shut), replica)
        route.replica, route.accepted_s = Standing(replica.name), time.monotonic()
        return asyncio.get_running_loop().create_task(replica.generate(frames, address, ticket))

    def broadcast(self, method: str, *args: Any) -> "Handle":
        if method == "drain":
            names, on = args
            self.draining = self.draining | set(names) if on else self.draining - set(names)
        self.asked = method
        return self

    async def results_async(self, **kwargs: object) -> list[Any]:
        there = [name for name in self.replicas if name not in self.away]
        if self.asked == "drain":
            return there
        numbers = [stats(name, draining=name in self.draining) for name in there]
        return [replace(one, agent=self.agents.get(one.engine_id, "")) for one in numbers]


class Client:
    """The request "r" and all that has come of it."""

    def __init__(self, core: ClusterCore, handle: Handle) -> None:
        self.core, self.handle = core, handle
        self.a, self.b = handle.replicas.values()
        self.outputs: list[EngineCoreOutput] = []

    @property
    def mine(self) -> list[EngineCoreOutput]:
        return [output for output in self.outputs if output.request_id == "r"]

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.mine for token in output.new_token_ids]

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
        await self.until(lambda: any(output.finished for output in self.mine))
        assert self.tokens == list(range(4, 4 + TOKENS))
        assert [output.finish_reason for output in self.mine if output.finished] == [FinishReason.LENGTH]
        assert all(output.kv_transfer_params is None for output in self.mine)
        assert not self.core._errands

    async def outlive_its_destination(self) -> None:
        """The request moves to "b", which dies of it at once: it is continued elsewhere."""
        self.b.faults = {"start": ActorDiedError()}
        moving = asyncio.create_task(self.core.migrate("r", "b"))
        await self.until(lambda: "moved here" in self.b.said)
        self.b.faults = {}
        await self.check_to_the_end()
        await asyncio.wait([moving], timeout=DEADLINE_S)
        moving.exception()
        assert self.core.continued == 1


@asynccontextmanager
async def client(call_agent: CallAgent | None = None) -> AsyncIterator[Client]:
    """call_agent: where it is given, each replica's node has an agent, "agent-a" and "agent-b"."""
    a, b = PlayedReplica("a"), PlayedReplica("b")
    handle = Handle(a, b)
    if call_agent is not None:
        handle.agents = {name: f"agent-{name}" for name in "ab"}
    core = ClusterCore("m", handle, INFO, replicas=2, replica_limit=4, call_agent=call_agent)  # type: ignore[arg-type]
    await core.open("127.0.0.1")
    try:
        async with asyncio.timeout(DEADLINE_S):
            while len(core.replica_numbers) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        asks = request()
        assert asks.sampling_params is not None
        asks.sampling_params.max_tokens = TOKENS
        await core.add_request_async(asks)
        one = Client(core, handle)
        await one.until(lambda: len(one.tokens) > 40)
        yield one
    finally:
        core.shutdown()
        a.channels.close()
        b.channels.close()
