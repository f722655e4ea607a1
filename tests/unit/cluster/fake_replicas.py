"""Replicas behind a Ray Serve handle, played in this process: each call of ``generate`` follows a script. Outputs go
over a real channel."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from ray.exceptions import ActorDiedError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import LogprobsLists

from cluster.core_client import ClusterCore
from cluster.route import News, Route
from replicas.answer_journal import AnswerJournal, Mark
from replicas.channel_wire import InboxAddress
from replicas.hop import Frames, HopCodec
from replicas.output_channel import ChannelBroken, Channels, Lane
from replicas.replica import ReplicaInfo, ReplicaStats

INFO = ReplicaInfo(supported_tasks=("generate",), max_model_len=128, kv_blocks=8, block_tokens=16)
Step = int | str | Exception
"""A token id to send, "finish", "end" (the stream ends), "wait" (for ever), "cancel", or an error to raise."""


def request(request_id: str = "r") -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=8),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def died() -> ActorDiedError:
    return ActorDiedError()


def stats(engine_id: str, running: int = 0, waiting: int = 0, draining: bool = False) -> ReplicaStats:
    numbers = SchedulerStats(num_running_reqs=running, num_waiting_reqs=waiting)
    return ReplicaStats(engine_id, 1, running, numbers, draining, f"node-of-{engine_id}", "10.0.0.1")


async def no_errand(frames: Frames, lane: Lane) -> None:
    """What is asked for over the channel."""
    raise AssertionError("no errand is expected")


@dataclass
class FakeCall:
    """What ``handle.options().generate.remote`` returns."""

    frames: Frames
    lane: AbstractContextManager[Lane]
    script: Sequence[Step]
    route: Route
    journal: AnswerJournal
    mark: Mark | None
    cancelled: bool = False
    codec: HopCodec = field(default_factory=HopCodec)
    gave_up: bool = False
    """Its lane has ended early."""

    def cancel(self) -> None:
        self.cancelled = True

    def __await__(self) -> Generator[Any, None, None]:
        return self._play().__await__()

    async def _play(self) -> None:
        asked = self.codec.decode_request(self.frames)
        request_id = asked.request_id
        with self.lane as lane, self.journal.recorded(self.mark, lane) as outlet:
            for step in self.script:
                await asyncio.sleep(0)
                if isinstance(step, int) or step == "finish":
                    reason = FinishReason.LENGTH if step == "finish" else None
                    tokens = [step] if isinstance(step, int) else []
                    logprobs = _logprobs(asked.sampling_params, tokens)
                    outlet.put(EngineCoreOutput(request_id, tokens, logprobs, finish_reason=reason))
                    continue
                async with asyncio.timeout(10):
                    while not lane.idle:  # noqa: ASYNC110  # plain state of the product, without an event
                        await asyncio.sleep(0)
                if isinstance(step, Exception):
                    raise step
                if step == "end":
                    return
                if step == "wait":
                    await self._wait(lane)
                if step == "cancel":
                    raise asyncio.CancelledError
            await lane.ended

    async def _wait(self, lane: Lane) -> None:
        try:
            await lane.ended
        except ChannelBroken:
            self.gave_up = True
            raise


def _logprobs(params: SamplingParams | None, tokens: list[int]) -> LogprobsLists | None:
    """All of them equally likely, where they are asked for."""
    if params is None or params.logprobs is None or not tokens:
        return None
    ids = np.array([[token, *range(max(0, params.logprobs))] for token in tokens])
    return LogprobsLists(ids, np.full(ids.shape, -1.0, np.float32), np.ones(len(tokens), int))


@dataclass
class FakeHandle:
    """Plays ``scripts`` one after the other; ``answers`` is what each replica's stats are, or a function that raises.
    ``news``: what a router would hear. ``takes``: a call is taken by its replica. ``journals``: of the replicas; calls
    are written into the first one."""

    scripts: list[Sequence[Step]] = field(default_factory=list)
    answers: Callable[[], list[Any]] = lambda: [stats("a")]
    calls: list[FakeCall] = field(default_factory=list)
    channels: Channels = field(default_factory=lambda: Channels("replica-a", no_errand))
    journals: list[AnswerJournal] = field(default_factory=lambda: [AnswerJournal("replica-a")])
    news: News = field(default_factory=News)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    """A replica answers what is asked of any."""
    asked: int = 0
    takes: bool = True

    @property
    def info(self) -> "FakeHandle":
        """Its method ``info``, which is called by ``remote``."""
        return cast(FakeHandle, SimpleNamespace(remote=self._info))

    async def _info(self) -> ReplicaInfo:
        self.asked += 1
        await self.started.wait()
        return INFO

    def options(self, *, method_name: str) -> "FakeHandle":
        assert method_name == "generate"
        return self

    def remote(self, frames: Frames, address: InboxAddress, ticket: int, route: Route, mark: Mark | None) -> FakeCall:
        route.news = self.news
        if self.takes:
            route.accepted_s = time.monotonic()
        lane, script = self.channels.lane(address, ticket), self.scripts[len(self.calls)]
        self.calls.append(FakeCall(frames, lane, script, route, self.journals[0], mark))
        return self.calls[-1]

    def broadcast(self, method: str, *args: Any) -> "Answers":
        if method == "find_answer":
            return Answers(lambda: [journal.find(*args) for journal in self.journals])
        ingress, queued = args
        assert (method, len(ingress), queued >= 0) == ("stats", 32, True)
        return Answers(self.answers)


@dataclass
class Answers:
    """To a broadcast."""

    ask: Callable[[], list[Any]]

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert timeout_s > 0
        assert return_exceptions
        return self.ask()


MakeCore = Callable[[FakeHandle], Awaitable[ClusterCore]]


@asynccontextmanager
async def cores(model: str) -> AsyncIterator[MakeCore]:
    """Builds cores of two replicas with room for four requests each, and closes them."""
    made: list[ClusterCore] = []
    handles: list[FakeHandle] = []

    async def make(handle: FakeHandle) -> ClusterCore:
        made.append(ClusterCore(model, handle, INFO, replicas=2, replica_limit=4))  # type: ignore[arg-type]
        handles.append(handle)
        await made[-1].open("127.0.0.1")
        return made[-1]

    yield make
    for core in made:
        core.shutdown()
    for handle in handles:
        handle.channels.close()
