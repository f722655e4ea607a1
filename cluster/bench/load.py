"""Sends a workload to a target and measures every answer."""

import asyncio
import itertools
import math
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from typing import Any

from cluster.bench.arrivals import Arrivals, ClosedLoop, due_times
from cluster.bench.clock import Clock, WallClock
from cluster.bench.errors import BenchError, RequestFailed
from cluster.bench.report import DEFAULT_PERCENTILES, LoadReport, RequestRecord, Slo
from cluster.bench.target import Chunk, Target, Usage
from cluster.bench.workload import Request, Workload

WARMUP_CLIENTS = 8

Done = Callable[[RequestRecord], None]


async def run_load(
    target: Target,
    workload: Workload,
    arrivals: Arrivals,
    *,
    seed: int = 0,
    warmup: int = 0,
    slo: Slo | None = None,
    percentiles: Sequence[float] = DEFAULT_PERCENTILES,
    on_done: Done | None = None,
    clock: Clock | None = None,
) -> LoadReport:
    """Send ``workload`` at the times of ``arrivals``; the report when every request has been answered or has failed.

    Args:
        seed: of random arrivals.
        warmup: this many requests of the workload's beginning are sent ahead, by WARMUP_CLIENTS clients, and do not
            count. The others then start with their first one's time as 0.
        slo: what a good request keeps; for goodput and attainment.
        on_done: called with each counted request's record when it has ended.
        clock: every time of the run is read from it; the machine's by default.

    Raises BenchError where nothing is left to count, or the requests carry no times to replay.
    """
    ahead, counted = workload.requests[:warmup], workload.requests[warmup:]
    if warmup < 0 or not counted:
        raise BenchError(
            f"{len(workload.requests)} requests with a warm-up of {warmup} leave none to count: give a smaller --warmup"
        )
    dues = None if isinstance(arrivals, ClosedLoop) else due_times(arrivals, counted, seed)
    clock = clock or WallClock()
    warming = _Run(target, None, clock)
    if ahead:
        await warming.closed_loop(ahead, WARMUP_CLIENTS)
    run = _Run(target, on_done, clock)
    if isinstance(arrivals, ClosedLoop):
        await run.closed_loop(counted, arrivals.concurrency)
    else:
        await run.open_loop(counted, dues or [])
    settings = {
        "workload": workload.settings,
        "arrivals": _arrivals_json(arrivals),
        "seed": seed,
        "warmup": warmup,
        "warmup_failed": sum(record.error is not None for record in warming.records),
    }
    return LoadReport(
        settings=settings,
        duration_s=run.now(),
        max_concurrent_requests=run.most_in_flight,
        records=sorted(run.records, key=lambda record: record.index),
        slo=slo,
        percentiles=tuple(percentiles),
    )


def _arrivals_json(arrivals: Arrivals) -> dict[str, Any]:
    """JSON has no infinity: it is written as text."""
    values = {name: "inf" if value == math.inf else value for name, value in asdict(arrivals).items()}
    return {"kind": type(arrivals).__name__, **values}


class _Run:
    """One pass over some requests. Times are seconds since its making."""

    def __init__(self, target: Target, on_done: Done | None, clock: Clock) -> None:
        self._target = target
        self._on_done = on_done
        self._clock = clock
        self._in_flight = 0
        self._started = clock.now()
        self.most_in_flight = 0
        self.records: list[RequestRecord] = []

    def now(self) -> float:
        return self._clock.now() - self._started

    async def open_loop(self, requests: Sequence[Request], dues: Sequence[float]) -> None:
        """Send each request when it is due, whatever has become of the ones before."""
        async with asyncio.TaskGroup() as group:
            for request, due_s in zip(requests, dues, strict=True):
                events = self._target.stream(request)
                await self._clock.sleep_until(self._started + due_s)
                group.create_task(self._observe(request, events, due_s))

    async def closed_loop(self, requests: Sequence[Request], clients: int) -> None:
        """Each client sends the next request that nobody has sent when its last one has ended."""
        waiting = iter(requests)

        async def client() -> None:
            for request in waiting:
                await self._observe(request, self._target.stream(request), None)

        async with asyncio.TaskGroup() as group:
            for _ in itertools.repeat(None, min(clients, len(requests))):
                group.create_task(client())

    async def _observe(self, request: Request, events: AsyncIterator[Chunk | Usage], due_s: float | None) -> None:
        record = RequestRecord(
            index=request.index,
            due_s=due_s,
            sent_s=self.now(),
            input_tokens=len(request.prompt),
            asked_tokens=request.output_len,
            clipped=request.clipped,
        )
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            await self._read(record, events)
        except RequestFailed as error:
            record.error = str(error)
        self._in_flight -= 1
        self.records.append(record)
        if self._on_done is not None:
            self._on_done(record)

    async def _read(self, record: RequestRecord, events: AsyncIterator[Chunk | Usage]) -> None:
        last_s: float | None = None
        counted, usage = 0, None
        gaps_s = array("d")
        async for event in events:
            if isinstance(event, Usage):
                usage = event
                continue
            now_s = self.now()
            if last_s is None:
                record.ttft_s = now_s - record.sent_s
            else:
                gaps_s.append(now_s - last_s)
            last_s = now_s
            counted += 1 if event.tokens is None else event.tokens
            record.exact_tokens = record.exact_tokens and event.tokens is not None
        if last_s is None:
            raise RequestFailed("the answer had no token")
        record.latency_s = last_s - record.sent_s
        record.itls_s = gaps_s
        record.output_tokens = counted
        if usage is not None:
            record.input_tokens, record.output_tokens = usage.input_tokens, usage.output_tokens
            record.exact_tokens = True
