"""What moving requests is worth on two real replicas: answers of which nobody knows the length, routed in turn, on
engines with little memory. The same load with and without the controller's move orders, in turns."""

import asyncio
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import overhead
from benchmarks.migration.two_replicas import Handle, Streams, two_replicas
from cluster.core_client import ClusterCore
from cluster.move import MoveOutcome
from cluster.move_planner import PLAN_EVERY_S, MovePlanner
from memory_agent.device_report import sample_engine
from memory_agent.lease_board import LeaseBoard
from memory_agent.tenant import Tenant
from replicas.spec import EngineSpec

KV_BLOCKS = 16
PROMPT_TOKENS = 100
ANSWER_MEDIAN, ANSWER_SPREAD, ANSWER_MOST = 100, 1.0, 700
SEED = 5
IDS = range(1000, 40000)


def spec() -> EngineSpec:
    """The engine of ``benchmarks.overhead`` with the memory of a few requests."""
    bytes_ = KV_BLOCKS * overhead.BLOCK_BYTES
    return replace(
        overhead.spec(elastic=True),
        max_model_len=1024,
        kv_ceiling_bytes=bytes_,
        kv_rest_bytes=2 * overhead.BLOCK_BYTES,
        kv_guarantee_bytes=bytes_,
        max_num_seqs=16,
    )


@dataclass
class Pass:
    """One pass over the load. ttft_s: of each request; preemptions: of both engines; moved: by outcome."""

    ttft_s: list[float] = field(default_factory=list)
    preemptions: int = 0
    moved: dict[str, int] = field(default_factory=dict)


class Uneven:
    """Two replicas under the load."""

    def __init__(self, core: ClusterCore, handle: Handle, board: LeaseBoard, requests: int, rate: float) -> None:
        self._core, self._handle, self._streams = core, handle, Streams(core)
        self._planner = MovePlanner(0)
        self._tenants = [Tenant(board.row(index), name, "m") for index, name in enumerate("ab")]
        rng = random.Random(SEED)
        self._load = [
            (
                rng.expovariate(rate),
                min(ANSWER_MOST, max(16, round(ANSWER_MEDIAN * rng.lognormvariate(0, ANSWER_SPREAD)))),
                rng.choices(IDS, k=PROMPT_TOKENS),
            )
            for _ in range(requests)
        ]

    async def run(self, name: str, moves: bool) -> Pass:
        """A pass; ``name`` tells its requests from those of others."""
        done, before = Pass(), dict(self._core.mover.counts)
        preempted = self._preemptions()
        planning = asyncio.get_running_loop().create_task(self._plan()) if moves else None
        asked: dict[str, float] = {}
        for number, (gap_s, tokens, prompt) in enumerate(self._load):
            await asyncio.sleep(gap_s)
            self._handle.first = "ab"[number % 2]
            request = f"{name}-{number}"
            asked[request] = time.monotonic()
            salt = name  # what an earlier pass has left in prefix caches is not for this one
            await self._streams.ask(request, prompt, tokens, salt=salt)
        for request in asked:
            await self._streams.until(request, ANSWER_MOST)
        if planning is not None:
            planning.cancel()
        done.ttft_s = [self._streams.times[request][0] - at_s for request, at_s in asked.items()]
        done.preemptions = self._preemptions() - preempted
        for (_, outcome), count in self._core.mover.counts.items():
            done.moved[outcome] = done.moved.get(outcome, 0) + count
        for (_, outcome), count in before.items():
            done.moved[outcome] -= count
        return done

    def _preemptions(self) -> int:
        return sum(sample_engine(one).preemptions for one in self._tenants)

    async def _plan(self) -> None:
        """What the agent and the controller do."""
        while True:
            await asyncio.sleep(PLAN_EVERY_S)
            self._planner.plan([(sample_engine(one), 0) for one in self._tenants], time.monotonic())
            self._core.relieve(self._planner.orders)


async def measure(requests: int, rate: float, turns: int) -> tuple[dict[str, float], dict[str, Any]]:
    """``ttft_p99_ratio``, TTFT p99 without moves over that with them, and details."""
    passes: dict[bool, list[Pass]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(prefix="ellm-uneven-") as folder:
        async with two_replicas(spec(), Path(folder)) as (core, handle):
            uneven = Uneven(core, handle, LeaseBoard.open(Path(folder) / "board"), requests, rate)
            for turn in range(turns):
                for moves in (False, True):
                    one = await uneven.run(f"{turn}-{moves}", moves)
                    passes[moves].append(one)
                    print(
                        f"  {'with' if moves else 'without'} moves: TTFT median {statistics.median(one.ttft_s):.2f} s, "
                        f"p99 {np.percentile(one.ttft_s, 99):.2f} s, {one.preemptions} preemptions, {one.moved}",
                        flush=True,
                    )
    p99 = {moves: float(np.percentile([t for one in runs for t in one.ttft_s], 99)) for moves, runs in passes.items()}
    stalls = {moves: sum(one.preemptions for one in runs) for moves, runs in passes.items()}
    details = {
        "with" if moves else "without": {
            "p99_ttft_s": round(p99[moves], 3),
            "preemptions": stalls[moves],
            "moves": sum(one.moved.get(MoveOutcome.MOVED, 0) for one in runs),
            "rerouted": sum(one.moved.get(MoveOutcome.REROUTED, 0) for one in runs),
            "ttft_s": [[round(t, 3) for t in one.ttft_s] for one in runs],
        }
        for moves, runs in passes.items()
    }
    return {"ttft_p99_ratio": round(p99[False] / p99[True], 2)}, details
