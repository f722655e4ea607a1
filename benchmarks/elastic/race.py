"""Starts the variants of a scenario side by side, each ready to run in its turns."""

import itertools
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.elastic.engine_target import EngineTarget
from benchmarks.elastic.running_clock import on_running_clock
from benchmarks.elastic.step_log import StepLog
from benchmarks.elastic.timed_scheduler import timed
from benchmarks.elastic.turns import Player, TurnClock, in_turns
from benchmarks.overhead import shrink_to
from cluster.bench.arrivals import Arrivals
from cluster.bench.load import run_load
from cluster.bench.report import LoadReport, Slo
from cluster.bench.workload import Workload
from memory_agent.lease_board import ReplicaWord
from replicas.local_engine import Instruments, LocalEngine, local_engine
from replicas.spec import EngineSpec
from replicas.warm_up import compute, warm_up_id

SHARING = 2
"""Racers compute as if so many engines shared the cores. With a thread on every core, one that loses its core to
another program holds up all others in every layer, and figures follow the neighbours instead of the engine."""


@dataclass(frozen=True)
class Racer:
    """A running engine that nobody else uses, stopped outside its turns."""

    engine: LocalEngine
    log: StepLog
    player: Player
    times: Path | None
    """Where the scheduler writes its SchedulerTimes, if it is timed."""

    def bound_steps(self, tokens: int) -> None:
        """At most so many tokens a step of an elastic engine, from the next one on."""
        row = self.engine.row
        assert row is not None
        row.set(ReplicaWord.TOKEN_BUDGET_MAX, tokens)
        row.set(ReplicaWord.TARGET_REVISION, row.get(ReplicaWord.TARGET_REVISION) + 1)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The racer's clock runs meanwhile, though there are no turns."""
        self.player.clock.start()
        try:
            yield
        finally:
            self.player.clock.stop()

    async def lease(self, limit_bytes: int) -> None:
        """What the device gives an elastic engine from now on. Returns when it holds no more KV memory than that."""
        await shrink_to(self.engine, limit_bytes)


@asynccontextmanager
async def racer(name: str, spec: EngineSpec, folder: Path, time_scheduler: bool = False) -> AsyncIterator[Racer]:
    """Start an engine and warm it up; the lease of an elastic one is its whole ceiling."""
    clock = TurnClock()
    log = StepLog(clock)
    times = folder / f"{name}.times" if time_scheduler else None
    instruments = Instruments([log], timed(times) if times else on_running_clock)
    async with local_engine(spec, folder / f"{name}.board", SHARING, instruments) as engine:
        await warm_up(engine)
        log.steps.clear()
        yield Racer(engine, log, Player([engine], clock), times)


@asynccontextmanager
async def racers(
    specs: Mapping[str, EngineSpec], folder: Path, time_schedulers: bool = False
) -> AsyncIterator[dict[str, Racer]]:
    """One for each of ``specs``."""
    async with AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(racer(name, spec, folder, time_schedulers))
            for name, spec in specs.items()
        }


async def race(
    field: Mapping[str, Racer], work: Workload, arrivals: Arrivals, seed: int, slo: Slo | None = None
) -> dict[str, LoadReport]:
    """The same load to every racer, in turns. While it has nothing to do its clock jumps to the next request."""

    async def run(name: str, racer: Racer) -> LoadReport:
        target, clock = EngineTarget(racer.engine), racer.player.clock
        clock.idle = lambda: target.idle
        report = await run_load(target, work, arrivals, seed=seed, slo=slo, clock=clock)
        print(f"  {name} done in {report.duration_s:.1f} s", flush=True)
        return report

    return await in_turns(
        {name: racer.player for name, racer in field.items()},
        {name: run(name, racer) for name, racer in field.items()},
    )


async def warm_up(engine: LocalEngine) -> None:
    """The first steps of a process are slow, and those of an elastic engine teach it what activations cost."""
    config = engine.llm.vllm_config
    numbers = itertools.count()

    async def generate(prompt: Sequence[int], tokens: int) -> None:
        await engine.generate(prompt, tokens, warm_up_id(next(numbers)))

    model, scheduler = config.model_config, config.scheduler_config
    most = scheduler.max_num_batched_tokens
    await compute(generate, model.get_vocab_size(), min(model.max_model_len // 2, most), scheduler.max_num_seqs)
