"""Idle footprint: bytes that an engine holds ten seconds after its last answer, against a static one.

Both answer the same burst first, which fills KV memory and the heap. The lease is watched as a replica watches it.
"""

import asyncio
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.elastic.outcome import Outcome, Panel
from benchmarks.elastic.process_memory import resident_bytes
from benchmarks.elastic.race import Racer, race, racers
from benchmarks.elastic.variants import MIB, bench_model, elastic_spec, static_spec
from cluster.bench.arrivals import OpenLoop
from cluster.bench.workload import random_workload
from replicas.lease_watch import WakePolicy, watch_lease

MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 32
KV_BLOCKS = 160
REQUESTS, INPUT, OUTPUT = 16, 512, 16
IDLE_S = 10.0
SEED = 5


@dataclass(frozen=True)
class Footprint:
    """Resident bytes of an engine's processes: when it was ready, right after the burst, and after IDLE_S."""

    ready_bytes: int
    busy_bytes: int
    idle_bytes: int


async def run(folder: Path) -> Outcome:
    """A burst to each engine in turns, then idleness of one after the other. ``folder``: for lease boards."""
    model = bench_model(MAX_MODEL_LEN)
    device_bytes = KV_BLOCKS * model.block_bytes
    specs = {
        "A": static_spec(model, MAX_NUM_SEQS, KV_BLOCKS, MAX_MODEL_LEN),
        "elastic": elastic_spec(model, MAX_NUM_SEQS, device_bytes, MAX_MODEL_LEN),
    }
    work = random_workload(REQUESTS, input_len=INPUT, output_len=OUTPUT, seed=SEED)
    async with racers(specs, folder) as field:
        ready = {name: resident_bytes(one.engine) for name, one in field.items()}
        await race(field, work, OpenLoop(), SEED)
        busy = {name: resident_bytes(one.engine) for name, one in field.items()}
        idle = {name: await _after_idleness(one) for name, one in field.items()}
    found = {name: Footprint(ready[name], busy[name], idle[name]) for name in field}
    for name, one in found.items():
        print(
            f"{name}: {one.ready_bytes / MIB:.0f} MiB when ready, {one.busy_bytes / MIB:.0f} after the burst, "
            f"{one.idle_bytes / MIB:.0f} after {IDLE_S:.0f} s of idleness",
            flush=True,
        )
    return Outcome(
        headline={
            "idle_bytes_ratio": found["elastic"].idle_bytes / found["A"].idle_bytes,
            "idle_bytes_saved_mib": (found["A"].idle_bytes - found["elastic"].idle_bytes) / MIB,
        },
        bounds={},
        details={
            "device_bytes": device_bytes,
            "weights_bytes": model.facts.weights_bytes,
            "footprints": {name: asdict(one) for name, one in found.items()},
        },
        panels=[
            Panel("resident when idle", "MiB", {name: [one.idle_bytes / MIB] for name, one in found.items()}),
        ],
    )


async def _after_idleness(racer: Racer) -> int:
    """Resident bytes after IDLE_S seconds in which nobody asks the engine anything."""
    engine = racer.engine
    watch = None
    if engine.row is not None:
        watch = asyncio.create_task(watch_lease(engine.row, engine.wake, WakePolicy()))
    await asyncio.sleep(IDLE_S)
    if watch is not None:
        watch.cancel()
    return resident_bytes(engine)
