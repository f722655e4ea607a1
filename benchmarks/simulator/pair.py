"""Two real engines behind a router of ours, in one process and without Ray: the cluster that is simulated."""

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.elastic.engine_target import EngineTarget
from benchmarks.elastic.race import SHARING, warm_up
from benchmarks.elastic.variants import bench_model, static_spec
from benchmarks.simulator.recorded_scheduler import read_steps, recorded
from cluster.bench.target import Chunk, Usage
from cluster.bench.workload import Request
from cluster.fleet_view import FleetView
from cluster.routing_policy import Load, RouteRequest
from replicas.engine_profile import EngineProfile
from replicas.local_engine import Instruments, local_engine
from replicas.spec import EngineSpec
from replicas.step_memory import Memory
from replicas.step_time import StepTime, StepWork

ENGINES = 2
MAX_MODEL_LEN, MAX_NUM_SEQS, STEP_TOKENS = 2048, 32, 512
KV_BLOCKS, BLOCK_TOKENS = 200, 128
"""Of each engine; vLLM's default KV block on CPU."""


@dataclass(frozen=True)
class Pair:
    """The running engines. ``records``: where each writes its steps."""

    targets: Sequence[EngineTarget]
    records: Sequence[Path]

    def steps(self, since_s: float) -> list[tuple[StepWork, float]]:
        """(work, seconds) of the steps of all engines that began after ``since_s``, monotonic."""
        return [(work, seconds) for _began_s, work, seconds in self.steps_in_time(since_s)]

    def steps_in_time(self, since_s: float) -> list[tuple[float, StepWork, float]]:
        """Likewise, each with its beginning."""
        return [step for path in self.records for step in read_steps(path) if step[0] >= since_s]


class RoutedTarget:
    """Both engines as one target of the load generator, routed by load, as a router without a controller does."""

    def __init__(self, pair: Pair, seed: int) -> None:
        self._pair = pair
        self._fleet = FleetView([f"engine-{n}" for n in range(ENGINES)])
        self._policy = Load(random.Random(seed))

    def stream(self, request: Request) -> AsyncIterator[Chunk | Usage]:
        return self._answer(request)

    async def _answer(self, request: Request) -> AsyncIterator[Chunk | Usage]:
        row = self._policy.rank(RouteRequest(len(request.prompt)), self._fleet, 0.0).best
        self._fleet.sent(row, len(request.prompt))
        try:
            async for chunk in self._pair.targets[row].stream(request):
                yield chunk
        finally:
            self._fleet.ended(row)


def engine_spec() -> EngineSpec:
    """As ``ellm serve`` makes them: elastic, activations not charged."""
    model = bench_model(MAX_MODEL_LEN, BLOCK_TOKENS)
    return replace(
        static_spec(model, MAX_NUM_SEQS, KV_BLOCKS, STEP_TOKENS),
        kv_rest_bytes=2 * model.block_bytes,
        kv_guarantee_bytes=(model.longest_blocks + 1) * model.block_bytes,
        elastic=True,
    )


def profile_of(spec: EngineSpec, step_time: StepTime, overhead_s: float, source: str) -> EngineProfile:
    """The engine model's profile of such an engine."""
    return EngineProfile(
        name="smollm2-135m-cpu",
        source=source,
        step_time=step_time,
        memory=Memory(spec.kv_ceiling_bytes // KV_BLOCKS, BLOCK_TOKENS, 0.0, 0.0),
        device_bytes=spec.kv_ceiling_bytes,
        weights_bytes=spec.weights_bytes,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        max_model_len=spec.max_model_len,
        overhead_s=overhead_s,
    )


@asynccontextmanager
async def running_pair(spec: EngineSpec, folder: Path) -> AsyncIterator[Pair]:
    """Start both engines and warm them up. ``folder``: for boards and records."""
    records = [folder / f"engine-{n}.steps" for n in range(ENGINES)]
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(
                local_engine(spec, folder / f"engine-{n}.board", SHARING, Instruments(prepare=recorded(path)))
            )
            for n, path in enumerate(records)
        ]
        for engine in engines:
            await warm_up(engine)
        yield Pair([EngineTarget(engine) for engine in engines], records)
