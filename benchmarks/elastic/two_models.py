"""Two models with bursts that alternate: one device that both share, against one that is split in half.

    split    two static engines, each with half of the bytes, which just hold a longest request, and its step size tuned
    shared   two elastic engines whose leases a memory agent gives, all bytes together

two_models_ttft_p99_ratio   TTFT p99 of all requests on the split device over that on the shared one
"""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.elastic.bounds import Job, Speed, best_chunk
from benchmarks.elastic.calibrate import measure_memory, measure_speed
from benchmarks.elastic.engine_target import EngineTarget
from benchmarks.elastic.forecast import Server, forecast
from benchmarks.elastic.outcome import Outcome, Panel
from benchmarks.elastic.race import SHARING, racer, warm_up
from benchmarks.elastic.turns import Player, TurnClock, in_turns
from benchmarks.elastic.variants import MIB, bench_model, elastic_spec, static_spec
from cluster.bench.arrivals import Replay, due_times
from cluster.bench.load import run_load
from cluster.bench.report import LoadReport, RequestRecord
from cluster.bench.workload import Workload, random_workload
from memory_agent.lease_board import LIMIT_UNIT_BYTES, EngineWord
from memory_agent.tenant import EngineTerms
from replicas.lease_watch import WakePolicy, watch_lease
from replicas.local_agent import LocalAgent, local_agent
from replicas.local_engine import LocalEngine, local_engine, local_engine_at
from replicas.spec import EngineSpec
from replicas.step_memory import Memory

MAX_MODEL_LEN = 512
BLOCK_TOKENS = 32
MAX_NUM_SEQS = 8
CHUNKS = (128, 256, 512)
BURST = Job(requests=4, prompt=250, output=256)
BURSTS = 2
"""Of each model, in turn."""
SEED = 41


@dataclass(frozen=True)
class Plan:
    """Device bytes, those that a model without requests keeps, and how the split device is used: the step size and KV
    blocks of each half."""

    device_bytes: int
    idle_bytes: int
    chunk: int
    half_blocks: int


async def run(folder: Path) -> Outcome:
    """Calibrate, print the bound, run both devices in turns. ``folder``: for lease boards."""
    model = bench_model(MAX_MODEL_LEN, BLOCK_TOKENS)
    memory = await measure_memory(model)
    shared = elastic_spec(model, MAX_NUM_SEQS, 0, MAX_MODEL_LEN)
    least_bytes = memory.activation_bytes(CHUNKS[0]) + model.longest_blocks * model.block_bytes
    half_bytes = -(-max(least_bytes, shared.guarantee_bytes) // LIMIT_UNIT_BYTES) * LIMIT_UNIT_BYTES
    idle_bytes = shared.kv_rest_bytes + memory.activation_bytes(MAX_NUM_SEQS)
    async with racer("calibration", elastic_spec(model, MAX_NUM_SEQS, 8 * half_bytes, MAX_MODEL_LEN), folder) as one:
        speed = await measure_speed(one, BURST, CHUNKS, (1, 8))
    chunk = best_chunk(BURST, half_bytes, memory, speed, model.longest_blocks)
    plan = Plan(2 * half_bytes, idle_bytes, chunk, memory.blocks(half_bytes, chunk))
    gap_s = _gap_s(plan, memory, speed)
    works = [_work(gap_s, BURSTS, SEED + model) for model in range(2)]
    bound = _bound(plan, memory, speed, works[0])
    print(
        f"device {plan.device_bytes / MIB:.0f} MiB; each half {plan.half_blocks} KV blocks and steps of {chunk}; "
        f"a burst of {BURST.requests} every {gap_s:.1f} s"
    )
    print("bound, TTFT p99: " + ", ".join(f"{name} {value:.1f} s" for name, value in bound.items()), flush=True)

    async with (
        _split(static_spec(model, MAX_NUM_SEQS, plan.half_blocks, chunk)) as halves,
        _shared(elastic_spec(model, MAX_NUM_SEQS, plan.device_bytes, MAX_MODEL_LEN), plan, folder) as (agent, tenants),
    ):
        before = [engine.word(EngineWord.INFLATE_BYTES) for engine in tenants]
        records = await _race({"split": halves, "shared": tenants}, works, gap_s)
        moved = [engine.word(EngineWord.INFLATE_BYTES) - was for engine, was in zip(tenants, before, strict=True)]
        most_held = agent.most_held_bytes
    found = {name: _ttft_p99_s(of) for name, of in records.items()}
    print("TTFT p99: " + ", ".join(f"{name} {value:.1f} s" for name, value in found.items()), flush=True)
    name = "two_models_ttft_p99_ratio"
    return Outcome(
        headline={name: found["split"] / found["shared"], f"{name}_vs_best": found["split"] / found["shared"]},
        bounds={name: bound["split"] / bound["shared"]},
        details={
            "plan": asdict(plan),
            "memory": asdict(memory),
            "speed": asdict(speed),
            "burst": asdict(BURST),
            "bursts_a_model": BURSTS,
            "burst_every_s": gap_s,
            "bound_ttft_p99_s": bound,
            "ttft_p99_s": found,
            "ttft_median_s": {name: float(np.median([r.ttft_s for r in of])) for name, of in records.items()},
            "mapped_bytes": moved,
            "most_kv_bytes_held": most_held,
        },
        panels=[Panel("two models, TTFT p99", "s", {name: [v] for name, v in found.items()}, bounds=bound)],
    )


def _gap_s(plan: Plan, memory: Memory, speed: Speed) -> float:
    """From one burst to the next: as long as the split device takes for one, so that its queues do not grow."""
    work = _work(0.0, 1, SEED)
    dues = [0.0] * len(work.requests)
    return max(record.latency_s for record in forecast(_half(plan, memory, speed), work.requests, dues))


def _work(gap_s: float, bursts: int, seed: int) -> Workload:
    """One model's bursts; between two of them there is time for one of the other model's."""
    work = random_workload(bursts * BURST.requests, input_len=BURST.prompt, output_len=BURST.output, seed=seed)
    requests = [replace(request, arrival_s=2 * gap_s * (request.index // BURST.requests)) for request in work.requests]
    return Workload(requests, work.settings)


def _half(plan: Plan, memory: Memory, speed: Speed) -> Server:
    prefill_s = speed.prefill_s[plan.chunk] / BURST.prompt
    return Server(plan.half_blocks - 1, MAX_NUM_SEQS, prefill_s, memory, speed)


def _bound(plan: Plan, memory: Memory, speed: Speed, work: Workload) -> dict[str, float]:
    """TTFT p99 where each model has its half, and where the one with a burst has all that the other does not keep.
    The bursts do not overlap, so one model is forecast for both."""
    half = _half(plan, memory, speed)
    shared = replace(half, blocks=memory.blocks(plan.device_bytes - plan.idle_bytes, MAX_NUM_SEQS) - 1)
    dues = due_times(Replay(), work.requests, SEED)
    return {
        name: _ttft_p99_s(forecast(server, work.requests, dues))
        for name, server in (("split", half), ("shared", shared))
    }


def _ttft_p99_s(records: Sequence[RequestRecord]) -> float:
    return float(np.percentile([record.ttft_s for record in records], 99))


@asynccontextmanager
async def _split(spec: EngineSpec) -> AsyncIterator[list[LocalEngine]]:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(local_engine(spec, None, SHARING)) for _ in range(2)]
        for engine in engines:
            await warm_up(engine)
        yield engines


@asynccontextmanager
async def _shared(spec: EngineSpec, plan: Plan, folder: Path) -> AsyncIterator[tuple[LocalAgent, list[LocalEngine]]]:
    async with AsyncExitStack() as stack:
        agent = stack.enter_context(local_agent(folder / "shared.board", plan.device_bytes, 2 * spec.weights_bytes))
        engines, watches = [], []
        for model in range(2):
            place = agent.register(
                EngineTerms(
                    f"model-{model}",
                    f"model-{model}",
                    spec.guarantee_bytes,
                    spec.ceiling_bytes,
                    spec.weights_bytes,
                    os.getpid(),
                )
            )
            engine = await stack.enter_async_context(local_engine_at(spec, place, SHARING))
            assert engine.row is not None
            watches.append(asyncio.create_task(watch_lease(engine.row, engine.wake, WakePolicy())))
            engines.append(engine)
        try:
            for engine in engines:
                await warm_up(engine)
            yield agent, engines
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)


async def _race(
    devices: Mapping[str, Sequence[LocalEngine]], works: Sequence[Workload], gap_s: float
) -> dict[str, list[RequestRecord]]:
    """The same bursts to both devices, in turns; the second model's begin ``gap_s`` later."""
    players = {name: Player(engines, TurnClock()) for name, engines in devices.items()}

    async def bursts(name: str, model: int) -> LoadReport:
        clock = players[name].clock
        await clock.sleep_until(model * gap_s)
        return await run_load(EngineTarget(devices[name][model]), works[model], Replay(), clock=clock)

    async def run(name: str) -> list[RequestRecord]:
        reports = await asyncio.gather(*(bursts(name, model) for model in range(len(works))))
        print(f"  {name} done in {max(report.duration_s for report in reports):.1f} s", flush=True)
        return [record for report in reports for record in report.records]

    return await in_turns(players, {name: run(name) for name in devices})
