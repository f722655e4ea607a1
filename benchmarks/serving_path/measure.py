"""What is measured of a system: tokens a second of 64 streams, and how late each token of a paced stream arrives."""

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp
import numpy as np

from cluster.bench.arrivals import ClosedLoop
from cluster.bench.load import run_load
from cluster.bench.openai_target import OpenAITarget, ServerOptions
from cluster.bench.workload import random_workload

STREAMS = 64
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Throughput:
    """One run of all streams. chunks: events with tokens; cpu_share: of one core, by the load generator."""

    tokens: int
    chunks: int
    seconds: float
    gap_p99_ms: float
    cpu_share: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def chunks_per_s(self) -> float:
        return self.chunks / self.seconds


async def throughput(url: str, model: str, tokens: int) -> Throughput:
    """STREAMS streams at once, each of ``tokens`` tokens, by the load generator of `ellm bench`. Raises RuntimeError
    where one fails."""
    async with OpenAITarget(ServerOptions(base_url=url, model=model, vocab_size=40_000)) as target:
        work = random_workload(STREAMS, input_len=PROMPT_TOKENS, output_len=tokens, vocab_size=40_000)
        cpu_s = time.process_time()
        report = await run_load(target, work, ClosedLoop(STREAMS))
        cpu_s = time.process_time() - cpu_s
    failed = [record.error for record in report.records if record.error is not None]
    if failed:
        raise RuntimeError(f"{len(failed)} of {STREAMS} streams failed: {failed[0]}")
    gaps = np.concatenate([np.asarray(record.itls_s) for record in report.records])
    return Throughput(
        tokens=sum(record.output_tokens for record in report.records),
        chunks=len(gaps) + STREAMS,
        seconds=report.duration_s,
        gap_p99_ms=float(np.percentile(gaps, 99)) * 1000 if len(gaps) else 0.0,
        cpu_share=cpu_s / report.duration_s,
    )


@dataclass
class Lateness:
    """Of each token: how long after the engine's own time for it it arrived at the client."""

    late_ms: list[float] = field(default_factory=list)
    chunks: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return len(self.late_ms) / self.seconds

    @property
    def tokens_per_chunk(self) -> float:
        return len(self.late_ms) / self.chunks

    def percentile(self, rank: float) -> float:
        return float(np.percentile(self.late_ms, rank))


async def lateness(url: str, model: str, tokens_per_s: float, seconds: float) -> Lateness:
    """STREAMS streams at once from an engine that is paced so. Its steps lie on multiples of its period on the clock
    that this process reads too, so token n of a stream was due n periods after its first one, whose step is the last
    one that no token came before."""
    result, began_s = Lateness(), time.monotonic()
    tokens = round(tokens_per_s * seconds)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        arrivals = await asyncio.gather(*(_arrivals(session, url, model, i, tokens, result) for i in range(STREAMS)))
    result.seconds = time.monotonic() - began_s
    period_s = 1 / tokens_per_s
    for times in arrivals:
        if len(times) != tokens:
            raise RuntimeError(f"{len(times)} of {tokens} tokens came")
        result.late_ms += late_ms(times, period_s)
    return result


def late_ms(arrivals_s: Sequence[float], period_s: float) -> list[float]:
    """How late each token of a stream was. arrivals_s: on the clock by whose multiples the engine steps."""
    since_first = [arrived - number * period_s for number, arrived in enumerate(arrivals_s)]
    first_step_s = min(since_first) // period_s * period_s
    return [(arrived - first_step_s) * 1000 for arrived in since_first]


async def _arrivals(
    session: aiohttp.ClientSession, url: str, model: str, index: int, tokens: int, result: Lateness
) -> list[float]:
    """When each token of one stream came. With usage in every chunk, which says how many tokens it has."""
    body = {
        "model": model,
        "prompt": [2000 + index] * PROMPT_TOKENS,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    arrivals: list[float] = []
    rest = b""
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(await answer.text())
        async for data in answer.content.iter_any():
            now_s = time.monotonic()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    new = event["usage"]["completion_tokens"] - len(arrivals)
                    arrivals += [now_s] * new
                    result.chunks += new > 0
    return arrivals


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
