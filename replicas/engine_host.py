"""vLLM's engine core behind requests: each has an outlet that its outputs go to.

    run() --> EngineCore process --> Worker process
    outlet of each request <-- one pump that hands out each step's outputs

Needs no Ray: what a Serve replica adds is in ``replicas.replica``.
"""

import asyncio
import time
from typing import Protocol

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.core_client import AsyncMPClient, EngineCoreClient
from vllm.v1.executor import Executor
from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats

from replicas.hop import Frames, HopCodec
from replicas.paced_core import PacedCore
from replicas.replica_demand import ReplicaDemand, TokenMeter

SHUTDOWN_TIMEOUT_S = 10.0


class Outlet(Protocol):
    """Where one request's outputs go."""

    ended: "asyncio.Future[None]"
    """Done when the last output has arrived where it should; with an exception when that cannot be any more."""

    def put(self, output: EngineCoreOutput) -> None:
        """Take one output, in order. It belongs to the outlet from here on."""


class EngineHost:
    """Starts the engine's processes and runs requests in them. Belongs to the event loop it is built on."""

    def __init__(self, config: VllmConfig, paced_core: PacedCore | None = None) -> None:
        """Loads the model; returns when the engine can run requests. Raises what vLLM raises where it cannot.

        Args:
            paced_core: takes the engine's place; no process is started then.
        """
        self.config = config
        self._codec = HopCodec()
        self._outlets: dict[str, Outlet] = {}
        self._stats = SchedulerStats()
        self._meter = TokenMeter(time.monotonic())
        self._core: AsyncMPClient | PacedCore = paced_core or EngineCoreClient.make_async_mp_client(
            config, Executor.get_class(config), log_stats=True
        )

    @property
    def dead(self) -> bool:
        return bool(self._core.resources.engine_dead)

    @property
    def streams(self) -> int:
        """Requests accepted and not finished."""
        return len(self._outlets)

    async def run(self, frames: Frames, outlet: Outlet) -> None:
        """Run one encoded EngineCoreRequest, and wait until its outputs have gone through ``outlet``.

        Whatever ends this earlier, a cancellation or the outlet's own exception, aborts the request in the engine.
        Raises that, and EngineDeadError where the engine is dead.
        """
        request = self._codec.decode_request(frames)
        request_id = request.request_id
        self._outlets[request_id] = outlet
        whole = False
        try:
            await self._core.add_request_async(request)
            await outlet.ended
            whole = True
        finally:
            del self._outlets[request_id]
            if not whole:
                await self._core.abort_requests_async([request_id])

    async def pump(self) -> None:
        """Hand every output to its outlet and keep the last step's numbers, for ever. Raises EngineDeadError at the
        engine's end."""
        while True:
            outputs = await self._core.get_output_async()
            for output in outputs.outputs:
                self._meter.output_tokens += len(output.new_token_ids)
                if output.prefill_stats is not None:
                    self._meter.prompts += 1
                    self._meter.prompt_tokens += output.prefill_stats.num_computed_tokens
                if (outlet := self._outlets.get(output.request_id)) is not None:
                    outlet.put(output)
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

    def demand(self) -> ReplicaDemand:
        """What this engine is asked for; rates are of the time since the last call."""
        prompt_rate, output_rate, request_rate = self._meter.rates(time.monotonic())
        return ReplicaDemand(
            prompt_rate=prompt_rate,
            output_rate=output_rate,
            request_rate=request_rate,
            running=self._stats.num_running_reqs,
            waiting=self._stats.num_waiting_reqs,
        )

    def close(self) -> None:
        """End the engine's processes; those that do not end by themselves within SHUTDOWN_TIMEOUT_S are killed."""
        self._core.shutdown(timeout=SHUTDOWN_TIMEOUT_S)


def _with_counts_of(stats: SchedulerStats, untold: SchedulerStats) -> SchedulerStats:
    """``stats`` of the last step with the counts of ``untold``, those of earlier steps, added to its own."""
    _add(stats.prefix_cache_stats, untold.prefix_cache_stats)
    loaded, before = stats.connector_prefix_cache_stats, untold.connector_prefix_cache_stats
    if loaded is not None and before is not None:
        _add(loaded, before)
    else:
        stats.connector_prefix_cache_stats = before if loaded is None else loaded
    return stats


def _add(mine: PrefixCacheStats, theirs: PrefixCacheStats) -> None:
    for name in ("requests", "queries", "hits", "preempted_requests", "preempted_queries", "preempted_hits"):
        setattr(mine, name, getattr(mine, name) + getattr(theirs, name))
    for source, hits in theirs.hits_by_source.items():
        mine.hits_by_source[source] = mine.hits_by_source.get(source, 0) + hits
    mine.reset = mine.reset or theirs.reset


def _without_counts(stats: SchedulerStats) -> SchedulerStats:
    """The gauges of ``stats`` alone."""
    return SchedulerStats(
        num_running_reqs=stats.num_running_reqs,
        num_waiting_reqs=stats.num_waiting_reqs,
        num_skipped_waiting_reqs=stats.num_skipped_waiting_reqs,
        kv_cache_usage=stats.kv_cache_usage,
    )
