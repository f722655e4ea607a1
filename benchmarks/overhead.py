"""What elasticity costs without memory pressure, and how fast memory comes back after a burst.

Two engines with the same settings, plain vLLM and elastic, answer the same closed loop of requests of mixed lengths,
in turns of half a second: while one runs the other is stopped (SIGSTOP), so a machine that is slower for a while, as
shared ones are, slows both. While the elastic engine runs, its lease is tightened to just above what it wants and
widened again three times a second, so that memory is really mapped and unmapped all the time.

    throughput_ratio       output tokens/s, elastic over plain, each over its own turns: median over rounds
    bytes_returned_ratio   KV bytes of a burst of 32 requests that are back with the operating system within 5 s after
                           the pool was told to shrink, as a share of what the burst added: the lower of st_blocks and
                           the process tree's resident memory
"""

import argparse
import asyncio
import random
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from benchmarks.record import finish
from cluster.default_model import get_default_model
from memory_agent.lease_board import EngineWord
from replicas.environment import environment
from replicas.local_engine import LocalEngine, local_engine
from replicas.spec import EngineSpec

BLOCK_BYTES = 30 * 2 * 3 * 64 * 4 * 128  # layers x (K, V) x KV heads x head size x float32 x tokens a block
CEILING_BLOCKS, REST_BLOCKS, GUARANTEE_BLOCKS = 364, 8, 18
CLIENTS = 16
SLICE_S = 0.5
"""A turn of one engine: short against the machine's slow and fast minutes, long against a step."""
SLACK_BLOCKS = 8
"""Room above the demand when the lease is tightest: a step is long, and a new request must not wait for another."""


def spec(elastic: bool) -> EngineSpec:
    return EngineSpec(
        model_name="smollm2",
        model_path=str(get_default_model(print)),
        max_model_len=2048,
        dtype="float32",
        kv_ceiling_bytes=CEILING_BLOCKS * BLOCK_BYTES,
        kv_rest_bytes=REST_BLOCKS * BLOCK_BYTES,
        kv_guarantee_bytes=GUARANTEE_BLOCKS * BLOCK_BYTES,
        weights_bytes=538 << 20,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        elastic=elastic,
        engine_args={"enforce_eager": True},
    )


class Gate:
    """As a context, keeps an engine's processes stopped, except where ``open`` lets them run."""

    def __init__(self, engine: LocalEngine) -> None:
        self._processes = [psutil.Process(pid) for pid in engine_pids(engine)]

    def __enter__(self) -> "Gate":
        self._signal(signal.SIGSTOP)
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGCONT)

    @contextmanager
    def open(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)


def engine_pids(engine: LocalEngine) -> set[int]:
    core = engine.core_process()
    return {core.pid} | {child.pid for child in core.children(recursive=True)}


@asynccontextmanager
async def breathing(engine: LocalEngine) -> AsyncIterator[None]:
    """Tighten the lease to just above what is wanted and widen it again: no pressure, only moves. Nothing happens to a
    static engine."""
    if engine.row is None:
        yield
        return

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


async def closed_loop(engine: LocalEngine, requests: int, seed: int) -> int:
    """Output tokens of ``requests`` requests from CLIENTS clients; no prompt is ever repeated."""
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

    await asyncio.gather(*(client(i) for i in range(CLIENTS)))
    return produced


@dataclass
class Run:
    """One engine's part of a round: output tokens, and the seconds in which the engine was not stopped."""

    tokens: int = 0
    seconds: float = 0.0
    maps: int = 0
    unmaps: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


async def round_of_runs(engines: Sequence[LocalEngine], requests: int, seed: int) -> list[Run]:
    """The same requests to every engine, in turns of SLICE_S seconds each, until all have answered."""
    runs = [Run() for _ in engines]
    with ExitStack() as stack:
        gates = [stack.enter_context(Gate(engine)) for engine in engines]
        loops = [asyncio.create_task(closed_loop(engine, requests, seed)) for engine in engines]
        while not all(loop.done() for loop in loops):
            for engine, gate, loop, run in zip(engines, gates, loops, runs, strict=True):
                if loop.done():
                    continue
                moved = moved_extents(engine)
                started = time.perf_counter()
                with gate.open():
                    async with breathing(engine):
                        await asyncio.wait([loop], timeout=SLICE_S)
                run.seconds += time.perf_counter() - started
                run.maps, run.unmaps = (
                    n + after - before
                    for n, after, before in zip((run.maps, run.unmaps), moved_extents(engine), moved, strict=True)
                )
        for run, loop in zip(runs, loops, strict=True):
            run.tokens = loop.result()
    return runs


def moved_extents(engine: LocalEngine) -> tuple[int, int]:
    """Extents (here: KV blocks) mapped and unmapped since the engine's start; none by a static engine."""
    if engine.row is None:
        return 0, 0
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


async def measure(rounds: int, requests: int) -> None:
    with tempfile.TemporaryDirectory() as folder, environment({"VLLM_RPC_BASE_PATH": folder}):  # for its sockets
        board = Path(folder) / "board"
        async with (
            local_engine(spec(False), None, engines=2) as plain,
            local_engine(spec(True), board, engines=2) as elastic,
        ):
            results: list[tuple[Run, Run]] = []
            for number in range(rounds + 1):  # the first round warms up and does not count
                if number % 2:
                    p, e = await round_of_runs([plain, elastic], requests, number)
                else:
                    e, p = await round_of_runs([elastic, plain], requests, number)
                print(
                    f"round {number}: plain {p.tokens_per_s:.1f} tok/s, elastic {e.tokens_per_s:.1f} tok/s, "
                    f"ratio {e.tokens_per_s / p.tokens_per_s:.3f}, "
                    f"{e.maps / e.seconds:.1f} maps/s, {e.unmaps / e.seconds:.1f} unmaps/s",
                    flush=True,
                )
                if number:
                    results.append((p, e))
            with Gate(plain):
                returned = await burst_returned(elastic)
            print(f"burst of {returned['burst_bytes'] / 2**20:.0f} MiB back in {returned['seconds']:.2f} s", flush=True)
            preemptions = elastic.word(EngineWord.PREEMPTIONS)
    ratios = [e.tokens_per_s / p.tokens_per_s for p, e in results]
    finish(
        "overhead",
        {
            "throughput_ratio": round(statistics.median(ratios), 4),
            "bytes_returned_ratio": round(min(returned["by_st_blocks"], returned["by_resident"]), 4),
            "maps_per_s": round(statistics.median(e.maps / e.seconds for _, e in results), 2),
            "unmaps_per_s": round(statistics.median(e.unmaps / e.seconds for _, e in results), 2),
        },
        {
            "ratios": [round(ratio, 4) for ratio in ratios],
            "plain": [asdict(p) for p, _ in results],
            "elastic": [asdict(e) for _, e in results],
            "burst": returned,
            "preemptions": preemptions,
            "ceiling_over_rest": CEILING_BLOCKS / REST_BLOCKS,
            "clients": CLIENTS,
            "requests_a_run": requests,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of elasticity without pressure; memory back after a burst.")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default 7)")
    parser.add_argument("--requests", type=int, default=32, help="requests to each engine in a round (default 32)")
    args = parser.parse_args()
    asyncio.run(measure(args.rounds, args.requests))


if __name__ == "__main__":
    main()
