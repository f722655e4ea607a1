"""One engine replica: vLLM's engine core behind streams of token ids.

    ingress --EngineCoreRequest--> generate() --> EngineCore process --> Worker process
    ingress <--EngineCoreOutput--- one stream a request, demultiplexed by one pump

The engine's death is the replica's death: the process ends at once, so that its streams fail where the ingress can send them
elsewhere, no router sends it another request, and Ray Serve starts a new one.
"""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray import serve
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.core_client import AsyncMPClient, EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor
from vllm.v1.metrics.stats import SchedulerStats

from replicas.board_link import BoardLink
from replicas.engine_config import build_vllm_config
from replicas.hop import Frames, HopCodec
from replicas.spec import EngineSpec

if TYPE_CHECKING:
    from memory_agent.agent import AgentSpec

logger = logging.getLogger("ray.serve")

SHUTDOWN_TIMEOUT_S = 5.0
ENGINE_DEAD_EXIT_CODE = 70


@dataclass(frozen=True)
class ReplicaInfo:
    """What an ingress needs to know of an engine before it can serve its API.

    Attributes:
        kv_blocks: KV blocks of the engine, the ceiling where the KV memory is elastic; block_tokens: tokens of one.
    """

    supported_tasks: tuple[str, ...]
    max_model_len: int
    kv_blocks: int
    block_tokens: int


@dataclass(frozen=True)
class ReplicaStats:
    """A replica's numbers now.

    Attributes:
        streams: requests that the replica has accepted and not finished.
        scheduler: gauges of the engine's last step; its counts are those since the last call, so each is told once.
    """

    engine_id: str
    pid: int
    streams: int
    scheduler: SchedulerStats


@dataclass
class _Stream:
    """Outputs of one request that have not crossed the hop yet."""

    ready: list[EngineCoreOutput] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, output: EngineCoreOutput) -> None:
        self.ready.append(output)
        self.wake.set()

    async def take(self) -> list[EngineCoreOutput]:
        """Everything that is ready, at least one output."""
        await self.wake.wait()
        self.wake.clear()
        taken, self.ready = self.ready, []
        return taken


class EngineReplica:
    """The engine of one Serve replica. Construction loads the model and returns when the engine can run requests."""

    def __init__(self, spec: EngineSpec, agent_spec: "AgentSpec | None" = None) -> None:
        """Must run on the event loop that will serve requests, as Ray Serve does it.

        Args:
            agent_spec: names the memory agent of this device; None runs the engine without a lease.

        Raises what vLLM raises for settings it refuses, and what the agent raises where the guarantee does not fit.
        """
        self.engine_id: str = serve.get_replica_context().replica_id.unique_id
        self._closing = False
        self._codec = HopCodec()
        self._streams: dict[str, _Stream] = {}
        self._stats = SchedulerStats()
        self._link = BoardLink(self.engine_id, spec, agent_spec) if agent_spec is not None else None
        self._config = build_vllm_config(spec)
        self._core: AsyncMPClient = EngineCoreClient.make_async_mp_client(
            self._config, Executor.get_class(self._config), log_stats=True
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._start(self._pump())
        if self._link is not None:
            self._start(self._link.follow_lease(self._wake_engine))
            self._start(self._link.follow_targets())

    async def generate(self, frames: Frames) -> AsyncGenerator[Frames, None]:
        """Run one encoded EngineCoreRequest and yield its outputs, encoded, as they come: all that is ready at a time.

        Leaving the generator early aborts the request in the engine.
        """
        request = self._codec.decode_request(frames)
        request_id = request.request_id
        stream = self._streams[request_id] = _Stream()
        finished = False
        try:
            await self._core.add_request_async(request)
            while not finished:
                outputs = await stream.take()
                finished = any(output.finished for output in outputs)
                yield self._codec.encode_outputs(outputs)
        finally:
            del self._streams[request_id]
            if not finished:
                await self._core.abort_requests_async([request_id])

    async def info(self) -> ReplicaInfo:
        cache = self._config.cache_config
        return ReplicaInfo(
            supported_tasks=tuple(await self._core.get_supported_tasks_async()),
            max_model_len=self._config.model_config.max_model_len,
            kv_blocks=cache.num_gpu_blocks or 0,
            block_tokens=cache.block_size or 0,
        )

    async def stats(self) -> ReplicaStats:
        told, self._stats = self._stats, _without_counts(self._stats)
        return ReplicaStats(engine_id=self.engine_id, pid=os.getpid(), streams=len(self._streams), scheduler=told)

    async def check_health(self) -> None:
        """Called by Ray Serve: raises where the engine is dead, which replaces the replica."""
        if self._core.resources.engine_dead:
            raise EngineDeadError()

    def __del__(self) -> None:
        """Ray Serve's destructor: end the engine's processes and give the lease back."""
        self._closing = True
        for task in getattr(self, "_tasks", ()):
            task.cancel()
        if (core := getattr(self, "_core", None)) is not None:
            core.shutdown(timeout=SHUTDOWN_TIMEOUT_S)
        if (link := getattr(self, "_link", None)) is not None:
            link.close()

    async def _pump(self) -> None:
        """Hand every output to the stream of its request, and keep the last step's numbers."""
        while True:
            outputs = await self._core.get_output_async()
            for output in outputs.outputs:
                if (stream := self._streams.get(output.request_id)) is not None:
                    stream.put(output)
            if outputs.scheduler_stats is not None:
                self._stats = _with_counts_of(outputs.scheduler_stats, self._stats)

    async def _wake_engine(self) -> None:
        # Any utility call makes an idle engine core look at its requests, and so at its lease; this one changes nothing.
        await self._core.call_utility_async("is_scheduler_paused")

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._on_task_end)
        self._tasks.append(task)

    def _on_task_end(self, task: "asyncio.Task[None]") -> None:
        """None of the tasks ends while the engine lives, so an end is the engine's, or a fault that must not go on unseen."""
        if self._closing or task.cancelled():
            return
        logger.critical("engine %s is gone; its replica ends with it", self.engine_id, exc_info=task.exception())
        logging.shutdown()
        os._exit(ENGINE_DEAD_EXIT_CODE)


def _with_counts_of(stats: SchedulerStats, untold: SchedulerStats) -> SchedulerStats:
    """``stats`` of the last step with the counts of ``untold``, those of earlier steps, added to its own."""
    mine, theirs = stats.prefix_cache_stats, untold.prefix_cache_stats
    for name in ("requests", "queries", "hits", "preempted_requests", "preempted_queries", "preempted_hits"):
        setattr(mine, name, getattr(mine, name) + getattr(theirs, name))
    mine.reset = mine.reset or theirs.reset
    return stats


def _without_counts(stats: SchedulerStats) -> SchedulerStats:
    """The gauges of ``stats`` alone."""
    return SchedulerStats(
        num_running_reqs=stats.num_running_reqs,
        num_waiting_reqs=stats.num_waiting_reqs,
        num_skipped_waiting_reqs=stats.num_skipped_waiting_reqs,
        kv_cache_usage=stats.kv_cache_usage,
    )
