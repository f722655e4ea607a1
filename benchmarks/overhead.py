"""What elasticity costs without memory pressure, and how fast memory comes back after a burst.

Two engines with the same settings, plain vLLM and elastic, are measured in alternating runs of a closed loop of
clients with requests of mixed lengths; the one that is not measured is stopped (SIGSTOP), because an idle vLLM worker
polls. While the elastic engine is measured, its lease is tightened to just above what it wants and widened again three
times a second, so that memory is really mapped and unmapped all the time.

    throughput_ratio       output tokens/s, elastic over plain: median over pairs of runs
    bytes_returned_ratio   KV bytes of a burst of 32 requests that are back with the operating system within 5 s after
                           the pool was told to shrink, as a share of what the burst added: the lower of st_blocks and
                           the process tree's resident memory
"""

import argparse
import asyncio
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import psutil

from benchmarks.record import finish
from cluster.app import engine_environment
from cluster.default_model import get_default_model
from memory_agent.lease_board import EngineWord
from replicas.local_engine import LocalEngine, local_engine
from replicas.spec import EngineSpec

BLOCK_BYTES = 30 * 2 * 3 * 64 * 2 * 128  # layers x (K, V) x KV heads x head size x bfloat16 x tokens a block
CEILING_BLOCKS, REST_BLOCKS, GUARANTEE_BLOCKS = 364, 8, 18
CLIENTS = 16
SLACK_BLOCKS = 8
"""Room above the demand when the lease is tightest: a step is long, and a new request must not wait for another."""


def spec(elastic: bool) -> EngineSpec:
    return EngineSpec(
        model_name="smollm2",
        model_path=str(get_default_model(print)),
        max_model_len=2048,
        dtype="bfloat16",
        kv_ceiling_bytes=CEILING_BLOCKS * BLOCK_BYTES,
        kv_rest_bytes=REST_BLOCKS * BLOCK_BYTES,
        kv_guarantee_bytes=GUARANTEE_BLOCKS * BLOCK_BYTES,
        weights_bytes=269 << 20,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        elastic=elastic,
        engine_args={"enforce_eager": True},
    )


@contextmanager
def stopped(engine: LocalEngine) -> Iterator[None]:
    """The engine's processes take no CPU meanwhile."""
    processes = [p for p in psutil.Process().children(recursive=True) if p.pid in engine_pids(engine)]
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


def engine_pids(engine: LocalEngine) -> set[int]:
    core = engine.core_process()
    return {core.pid} | {child.pid for child in core.children(recursive=True)}


@asynccontextmanager
async def breathing(engine: LocalEngine) -> AsyncIterator[None]:
    """Tighten the lease to just above what is wanted and widen it again: no pressure, only moves."""

    async def breathe() -> None:
        while True:
            demand = max(engine.word(EngineWord.USED_BYTES), engine.word(EngineWord.DEMAND_BYTES))
            engine.set_limit(max(demand + SLACK_BLOCKS * BLOCK_BYTES, GUARANTEE_BLOCKS * BLOCK_BYTES))
            await asyncio.sleep(0.1)
            engine.set_limit(CEILING_BLOCKS * BLOCK_BYTES)
            await asyncio.sleep(0.23)

    task = asyncio.create_task(breathe())
    try:
        yield
    finally:
        task.cancel()


async def closed_loop(engine: LocalEngine, requests: int, seed: int) -> float:
    """Output tokens a second of ``requests`` requests from CLIENTS clients; no prompt is ever repeated."""
    rng = random.Random(seed)
    work = iter(
        [
            ([rng.randrange(1000, 40000) for _ in range(rng.randrange(64, 384))], rng.randrange(16, 96))
            for _ in range(requests)
        ]
    )
    produced = 0

    async def client(number: int) -> None:
        nonlocal produced
        for i, (prompt, tokens) in enumerate(work):
            answer = await engine.generate(prompt, tokens, f"{seed}-{number}-{i}")
            produced += len(answer)

    started = time.perf_counter()
    await asyncio.gather(*(client(i) for i in range(CLIENTS)))
    return produced / (time.perf_counter() - started)


def moved_extents(engine: LocalEngine) -> tuple[int, int]:
    """Extents (here: KV blocks) mapped and unmapped since the engine's start."""
    return engine.word(EngineWord.INFLATE_BYTES) // BLOCK_BYTES, engine.word(EngineWord.DEFLATE_BYTES) // BLOCK_BYTES


def resident_bytes(engine: LocalEngine) -> int:
    """Resident bytes of the engine's process tree."""
    return sum(psutil.Process(pid).memory_info().rss for pid in engine_pids(engine))


async def shrink_to(engine: LocalEngine, limit_bytes: int) -> float:
    """Tell the pool to shrink; seconds until it has, by the operating system, or 5."""
    started = time.monotonic()
    engine.set_limit(limit_bytes)
    await engine.wake()
    while engine.held_bytes_os() > limit_bytes and time.monotonic() - started < 5:
        await asyncio.sleep(0.02)
        await engine.wake()
    return time.monotonic() - started


async def burst_returned(engine: LocalEngine) -> dict[str, float]:
    """Fill KV memory with a burst, tell the pool to shrink, and see what the operating system has back after 5 s."""
    rng = random.Random(99)
    rest = REST_BLOCKS * BLOCK_BYTES
    await shrink_to(engine, rest)
    engine.set_limit(CEILING_BLOCKS * BLOCK_BYTES)
    held_before, resident_before = engine.held_bytes_os(), resident_bytes(engine)
    prompts = [[rng.randrange(1000, 40000) for _ in range(500)] for _ in range(32)]
    await engine.generate_all(prompts, 12, "burst")
    held_peak, resident_peak = engine.held_bytes_os(), resident_bytes(engine)
    seconds = await shrink_to(engine, rest)
    held, resident = engine.held_bytes_os(), resident_bytes(engine)
    engine.set_limit(CEILING_BLOCKS * BLOCK_BYTES)
    await engine.generate(prompts[0], 4, "after")  # the same engine still serves
    burst = held_peak - held_before
    return {
        "burst_bytes": burst,
        "seconds": seconds,
        "by_st_blocks": (held_peak - held) / burst,
        "by_resident": (resident_peak - resident) / (resident_peak - resident_before),
        "resident_peak": resident_peak,
        "resident_after": resident,
        "resident_before": resident_before,
    }


async def measure(pairs: int, requests: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        board = Path(folder) / "board"
        async with local_engine(spec(False), None) as plain, local_engine(spec(True), board) as elastic:
            ratios, rates, moves = [], [], []
            for pair in range(pairs + 1):  # the first pair warms up and does not count
                order = [plain, elastic] if pair % 2 else [elastic, plain]
                rate: dict[bool, float] = {}
                for engine in order:
                    with stopped(plain if engine is elastic else elastic):
                        before = moved_extents(elastic)
                        started = time.monotonic()
                        if engine is elastic:
                            async with breathing(elastic):
                                rate[True] = await closed_loop(engine, requests, pair)
                            seconds = time.monotonic() - started
                            moves.append(
                                [(n - b) / seconds for n, b in zip(moved_extents(elastic), before, strict=True)]
                            )
                        else:
                            rate[False] = await closed_loop(engine, requests, pair)
                print(
                    f"pair {pair}: plain {rate[False]:.1f} tok/s, elastic {rate[True]:.1f} tok/s, "
                    f"ratio {rate[True] / rate[False]:.3f}, {moves[-1][0]:.1f} maps/s, {moves[-1][1]:.1f} unmaps/s",
                    flush=True,
                )
                if pair:
                    ratios.append(rate[True] / rate[False])
                    rates.append([rate[False], rate[True]])
            with stopped(plain):
                returned = await burst_returned(elastic)
            print(f"burst of {returned['burst_bytes'] / 2**20:.0f} MiB back in {returned['seconds']:.2f} s", flush=True)
            preemptions = elastic.word(EngineWord.PREEMPTIONS)
    finish(
        "overhead",
        {
            "throughput_ratio": round(statistics.median(ratios), 4),
            "bytes_returned_ratio": round(min(returned["by_st_blocks"], returned["by_resident"]), 4),
            "maps_per_s": round(statistics.median(m[0] for m in moves[1:]), 2),
            "unmaps_per_s": round(statistics.median(m[1] for m in moves[1:]), 2),
        },
        {
            "ratios": ratios,
            "tokens_per_s_plain_elastic": rates,
            "moves_per_s": moves,
            "burst": returned,
            "preemptions": preemptions,
            "ceiling_over_rest": CEILING_BLOCKS / REST_BLOCKS,
            "clients": CLIENTS,
            "requests_a_run": requests,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of elasticity without pressure; memory back after a burst.")
    parser.add_argument("--pairs", type=int, default=7, help="alternating pairs of runs that count (default 7)")
    parser.add_argument("--requests", type=int, default=48, help="requests a run (default 48)")
    args = parser.parse_args()
    os.environ.update(engine_environment(spec(True), engines=2))
    asyncio.run(measure(args.pairs, args.requests))


if __name__ == "__main__":
    main()
