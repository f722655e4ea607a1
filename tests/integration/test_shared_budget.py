"""Two real engines share one device's KV budget through a real memory agent; the operating system's numbers decide."""

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray

from memory_agent.agent import AgentSpec, Registration, ensure_agent
from memory_agent.lease_board import LeaseBoard, Row
from replicas.lease_watch import WakePolicy, watch_lease
from replicas.local_engine import LocalEngine, local_engine_at
from tests.integration.small_engine import BUDGET_BYTES, GUARANTEE_BYTES, WEIGHTS_BYTES, burst, small_spec


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


async def register(agent: Any, engine_id: str) -> Registration:
    registration: Registration = await agent.register.remote(
        engine_id, "smollm2", GUARANTEE_BYTES, BUDGET_BYTES, WEIGHTS_BYTES, os.getpid()
    )
    return registration


@pytest.mark.usefixtures("cluster")
@pytest.mark.slow
def test_memory_goes_where_it_is_needed() -> None:
    """One engine takes over 70 % of the budget while the other idles, gives back when the other needs it, and both
    together never hold more than the budget."""
    agent = ensure_agent(AgentSpec(f"test-{os.getpid()}", "shared-budget", BUDGET_BYTES, 2 * WEIGHTS_BYTES))
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
        local_engine_at(small_spec(), places[0], engines=2) as first,
        local_engine_at(small_spec(), places[1], engines=2) as second,
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
    alone = asyncio.create_task(first.generate_all(burst(1, 9, 440), 70, "first"))
    while samples.most_of(0) <= 0.7 * BUDGET_BYTES:
        assert not alone.done(), f"the first engine held at most {samples.most_of(0) / BUDGET_BYTES:.0%} of the budget"
        await asyncio.sleep(0.02)
    begun = time.monotonic()
    answers = await second.generate_all(burst(2, 6, 440), 24, "second")
    assert [len(answer) for answer in answers] == [24] * 6
    assert samples.most_of(1, begun) > GUARANTEE_BYTES
    assert samples.least_of(0, begun) < 0.7 * BUDGET_BYTES
    assert [len(answer) for answer in await alone] == [70] * 9
