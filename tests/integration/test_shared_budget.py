"""Two real engines share one device's KV budget through a real memory agent; the operating system's numbers decide."""

import asyncio
import itertools
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.default_model import get_default_model
from memory_agent.agent import AgentSpec, Registration, ensure_agent
from memory_agent.lease_board import LeaseBoard, Row
from replicas.lease_watch import WakePolicy, watch_lease
from replicas.local_engine import LocalEngine, local_engine_at
from replicas.spec import EngineSpec

BLOCK_BYTES = 30 * 2 * 3 * 64 * 2 * 128  # layers x (K, V) x KV heads x head size x bfloat16 x tokens a block
BUDGET_BYTES = 40 * BLOCK_BYTES

GUARANTEE_BYTES = 10 * BLOCK_BYTES


def spec() -> EngineSpec:
    return EngineSpec(
        model_name="smollm2",
        model_path=str(get_default_model(lambda line: None)),
        max_model_len=1024,
        dtype="bfloat16",
        kv_ceiling_bytes=BUDGET_BYTES,
        kv_rest_bytes=2 * BLOCK_BYTES,
        kv_guarantee_bytes=GUARANTEE_BYTES,
        weights_bytes=269 << 20,
        max_num_seqs=16,
        engine_args={"enforce_eager": True},
    )


@dataclass
class Samples:
    """What the operating system said, 100 times a second: (seconds, bytes of engine 0, bytes of engine 1)."""

    held: list[tuple[float, int, int]] = field(default_factory=list)

    def most_in_all(self) -> int:
        return max(first + second for _, first, second in self.held)

    def most_of(self, engine: int, since: float = 0.0) -> int:
        return max((sample[1 + engine] for sample in self.held if sample[0] >= since), default=0)

    def least_of(self, engine: int, since: float) -> int:
        return min(sample[1 + engine] for sample in self.held if sample[0] >= since)


@contextmanager
def sampled(rows: list[Row]) -> Iterator[Samples]:
    """Sample both engines' memory files while the block runs."""
    files = [[f"/proc/{pid}/fd/{fd}" for pid, fd in row.workers] for row in rows]
    samples, stop = Samples(), threading.Event()

    def run() -> None:
        while not stop.wait(0.01):
            first, second = (sum(os.stat(file).st_blocks * 512 for file in engine) for engine in files)
            samples.held.append((time.monotonic(), first, second))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def burst(seed: int, requests: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1000, 40000) for _ in range(440)] for _ in range(requests)]


async def register(agent: Any, engine_id: str) -> Registration:
    registration: Registration = await agent.register.remote(
        engine_id, "smollm2", GUARANTEE_BYTES, BUDGET_BYTES, 269 << 20, os.getpid()
    )
    return registration


@pytest.mark.usefixtures("cluster")
def test_memory_goes_where_it_is_needed() -> None:
    """One engine takes over 70 % of the budget while the other idles, gives back when the other needs it, and both
    together never hold more than the budget."""
    agent = ensure_agent(AgentSpec(f"test-{os.getpid()}", "shared-budget", BUDGET_BYTES))
    path = Path(ray.get(agent.describe.remote())["board_path"])
    try:
        asyncio.run(two_engines(agent))
    finally:
        ray.kill(agent)
        path.unlink()


async def two_engines(agent: Any) -> None:
    places = [await register(agent, engine_id) for engine_id in ("first", "second")]
    rows = [LeaseBoard.open(Path(place.board_path)).row(place.row) for place in places]
    async with (
        local_engine_at(spec(), places[0], engines=2) as first,
        local_engine_at(spec(), places[1], engines=2) as second,
    ):
        watches = [
            asyncio.create_task(watch_lease(row, engine.wake, WakePolicy()))
            for row, engine in zip(rows, (first, second), strict=True)
        ]
        with sampled(rows) as samples:
            await demand_moves(first, second, samples)
        for watch in watches:
            watch.cancel()
    assert len(samples.held) > 500
    gaps = sorted(b[0] - a[0] for a, b in itertools.pairwise(samples.held))
    assert gaps[len(gaps) // 2] < 0.02
    assert samples.most_in_all() <= BUDGET_BYTES


async def demand_moves(first: LocalEngine, second: LocalEngine, samples: Samples) -> None:
    alone = asyncio.create_task(first.generate_all(burst(1, 9), 70, "first"))
    while samples.most_of(0) <= 0.7 * BUDGET_BYTES:
        assert not alone.done(), f"the first engine held at most {samples.most_of(0) / BUDGET_BYTES:.0%} of the budget"
        await asyncio.sleep(0.02)
    begun = time.monotonic()
    answers = await second.generate_all(burst(2, 6), 8, "second")
    assert [len(answer) for answer in answers] == [8] * 6
    assert samples.most_of(1, begun) > GUARANTEE_BYTES
    assert samples.least_of(0, begun) < 0.7 * BUDGET_BYTES
    assert [len(answer) for answer in await alone] == [70] * 9
