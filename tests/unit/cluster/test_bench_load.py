"""Sending and measuring, against engines in this process that answer as they are told."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest

from cluster.bench.arrivals import ClosedLoop, OpenLoop, Replay
from cluster.bench.errors import BenchError, RequestFailed
from cluster.bench.load import WARMUP_CLIENTS, run_load
from cluster.bench.report import RequestRecord, Slo
from cluster.bench.target import Chunk, Usage
from cluster.bench.workload import Request, random_workload

Answer = Callable[[Request], AsyncIterator[Chunk | Usage]]


class Engine:
    """A target that notes what it was asked and how many requests it had at once."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.asked: list[int] = []
        self.running = self.most_running = 0

    async def stream(self, request: Request) -> AsyncIterator[Chunk | Usage]:
        self.asked.append(request.index)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            async for event in self._answer(request):
                yield event
        finally:
            self.running -= 1


def paced(first_s: float, gap_s: float, chunk: Chunk | None = None) -> Answer:
    async def answer(request: Request) -> AsyncIterator[Chunk | Usage]:
        for i in range(request.output_len):
            await asyncio.sleep(gap_s if i else first_s)
            yield chunk or Chunk(1)

    return answer


async def test_an_open_loop_never_waits_for_answers() -> None:
    """An engine that answers nothing until all requests have come gets them all, in flight at once."""
    work = random_workload(30, input_len=4, output_len=1)
    everything = asyncio.Event()

    async def answer(request: Request) -> AsyncIterator[Chunk | Usage]:
        if engine.running == 30:
            everything.set()
        await asyncio.wait_for(everything.wait(), 30)
        yield Chunk(1)

    engine = Engine(answer)
    report = await run_load(engine, work, OpenLoop(200.0))
    assert (len(report.answered), report.max_concurrent_requests) == (30, 30)
    dues = [record.due_s for record in report.records]
    assert dues[-1] == pytest.approx(0.15)
    assert all(due is not None and record.sent_s >= due for due, record in zip(dues, report.records, strict=True))


async def test_a_closed_loop_keeps_its_number_in_flight() -> None:
    """Never more than the clients, never fewer while there is work; nothing is late, as nothing was due."""
    engine = Engine(paced(0.002, 0.0))
    report = await run_load(engine, random_workload(40, input_len=4, output_len=1), ClosedLoop(5))
    assert engine.asked == list(range(40))
    assert (engine.most_running, report.max_concurrent_requests) == (5, 5)
    assert report.schedule_lag is None
    assert report.to_json()["p99_schedule_lag_ms"] is None


async def test_times_are_what_the_engine_took() -> None:
    """TTFT is the wait for the first token, TPOT and ITL the gaps: their ratios are the engine's."""
    report = await run_load(Engine(paced(0.2, 0.02)), random_workload(4, input_len=4, output_len=11), OpenLoop())
    assert report.ttft.median_ms / report.tpot.median_ms == pytest.approx(10, rel=0.25)
    assert report.e2el.median_ms / report.ttft.median_ms == pytest.approx(2, rel=0.25)
    assert report.itl.median_ms == pytest.approx(report.tpot.median_ms, rel=0.25)
    assert (report.total_input_tokens, report.total_output_tokens) == (16, 44)
    assert report.output_throughput == pytest.approx(44 / report.duration_s)


async def test_the_engines_own_count_replaces_ours() -> None:
    """Usage decides how many tokens there were; chunks without a number are guessed at one each only without it."""

    async def answer(request: Request) -> AsyncIterator[Chunk | Usage]:
        for _ in range(2):
            yield Chunk()
        if request.index == 0:
            yield Usage(input_tokens=9, output_tokens=6)

    report = await run_load(Engine(answer), random_workload(2, input_len=4, output_len=2), OpenLoop())
    counts = [(record.input_tokens, record.output_tokens, record.exact_tokens) for record in report.records]
    assert counts == [(9, 6, True), (4, 2, False)]


async def test_the_warm_up_is_sent_ahead_and_does_not_count() -> None:
    """The workload's first requests, all answered before the counted ones start; a replay's clock starts after them."""
    work = random_workload(20, input_len=4, output_len=1)
    timed = [Request(one.index, one.prompt, 1, one.index * 0.01) for one in work.requests]
    engine = Engine(paced(0.005, 0.0))
    seen: list[RequestRecord] = []
    report = await run_load(engine, type(work)(timed), Replay(), warmup=12, on_done=seen.append)
    assert engine.asked[:12] == list(range(12))
    assert [record.index for record in report.records] == list(range(12, 20))
    assert report.records[0].due_s == 0.0
    assert sorted(record.index for record in seen) == list(range(12, 20))
    assert engine.most_running <= WARMUP_CLIENTS
    with pytest.raises(BenchError, match="smaller --warmup"):
        await run_load(engine, work, OpenLoop(), warmup=20)


async def test_a_failed_request_is_recorded_and_the_run_goes_on() -> None:
    """Also when it fails after its first token; an answer without a token has failed."""

    async def answer(request: Request) -> AsyncIterator[Chunk | Usage]:
        if request.index == 2:
            return
        yield Chunk(1)
        if request.index == 1:
            raise RequestFailed("engine died")

    slo = Slo(e2el_ms=60000)
    report = await run_load(Engine(answer), random_workload(4, input_len=4, output_len=1), OpenLoop(), slo=slo)
    assert [record.error for record in report.records] == [None, "engine died", "the answer had no token", None]
    assert [record.output_tokens for record in report.records] == [1, 0, 0, 1]
    assert report.attainment == 0.5


async def test_what_is_no_failed_request_ends_the_run() -> None:
    """An engine's own fault is not counted away, and the other streams end too."""

    async def answer(request: Request) -> AsyncIterator[Chunk | Usage]:
        if request.index == 1:
            raise ZeroDivisionError
        await asyncio.sleep(3600)
        yield Chunk(1)

    engine = Engine(answer)
    with pytest.raises(ExceptionGroup) as caught:
        await run_load(engine, random_workload(3, input_len=4, output_len=1), OpenLoop())
    assert caught.group_contains(ZeroDivisionError)


async def test_a_generator_that_cannot_keep_up_is_found_out() -> None:
    """Work that blocks the loop makes requests late against their times, and the report says so."""

    async def answer(request: Request) -> AsyncIterator[Chunk | Usage]:
        time.sleep(0.05)  # noqa: ASYNC251 - it is the fault to be found
        yield Chunk(1)

    report = await run_load(Engine(answer), random_workload(12, input_len=4, output_len=1), OpenLoop(200.0))
    assert report.generator_late
    assert report.schedule_lag is not None
    assert report.schedule_lag.percentiles_ms[100.0] > report.schedule_lag.median_ms > 0
