"""vLLM's engine core behind streams of token ids.

    generate() --> EngineCore process --> Worker process
    one stream a request <-- one pump that hands each output to its stream

Needs no Ray: what a Serve replica adds is in ``replicas.replica``.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.core_client import AsyncMPClient, EngineCoreClient
from vllm.v1.executor import Executor
from vllm.v1.metrics.stats import SchedulerStats

from replicas.hop import Frames, HopCodec

SHUTDOWN_TIMEOUT_S = 10.0


@dataclass
class _Stream:
    """Outputs of one request that nobody has taken yet."""

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


class EngineHost:
    """Starts the engine's processes and streams requests through them. Belongs to the event loop it is built on."""

    def __init__(self, config: VllmConfig) -> None:
        """Loads the model; returns when the engine can run requests. Raises what vLLM raises where it cannot."""
        self.config = config
        self._codec = HopCodec()
        self._streams: dict[str, _Stream] = {}
        self._stats = SchedulerStats()
        self._core: AsyncMPClient = EngineCoreClient.make_async_mp_client(
            config, Executor.get_class(config), log_stats=True
        )

    @property
    def dead(self) -> bool:
        return bool(self._core.resources.engine_dead)

    @property
    def streams(self) -> int:
        """Requests accepted and not finished."""
        return len(self._streams)

    async def generate(self, frames: Frames) -> AsyncGenerator[Frames, None]:
        """Run one encoded EngineCoreRequest and yield its outputs, encoded, as they come: all that is ready at a
        time.

        Leaving the generator early aborts the request in the engine. Raises EngineDeadError where the engine is dead.
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

    async def pump(self) -> None:
        """Hand every output to its stream and keep the last step's numbers, for ever. Raises EngineDeadError at the
        engine's end."""
        while True:
            outputs = await self._core.get_output_async()
            for output in outputs.outputs:
                if (stream := self._streams.get(output.request_id)) is not None:
                    stream.put(output)
            if outputs.scheduler_stats is not None:
                self._stats = _with_counts_of(outputs.scheduler_stats, self._stats)

    async def supported_tasks(self) -> tuple[str, ...]:
        return tuple(await self._core.get_supported_tasks_async())

    async def wake(self) -> None:
        """Make an idle engine look at its requests, and so at its lease. The call itself changes nothing."""
        await self._core.call_utility_async("is_scheduler_paused")

    def take_stats(self) -> SchedulerStats:
        """Gauges of the last step, and counts since the last call: each is told once."""
        told, self._stats = self._stats, _without_counts(self._stats)
        return told

    def close(self) -> None:
        """End the engine's processes; those that do not end by themselves within SHUTDOWN_TIMEOUT_S are killed."""
        self._core.shutdown(timeout=SHUTDOWN_TIMEOUT_S)


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
