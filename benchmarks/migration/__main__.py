"""What a live migration costs the request that moves, and those that do not. Two engines of the default model, float32,
one core each; prompts are random, so that nothing of them is in a prefix cache.

    downtime_steps_median    gap between the last token before and the first after, less a normal gap, in decode steps
                             of that stream: median over contexts and rounds
    downtime_context_slope   that gap, in steps, at the longest context over that at 1K tokens, less 1
    slowdown_ratio           gap between tokens of two other streams while 4K tokens of context move, over that just
                             before, the same streams running: median over rounds, of the side that is slower
    ttft_p99_ratio           TTFT p99 of an uneven load on replicas with little memory, without the controller's move
                             orders over that with them (``benchmarks.migration.uneven``)

Beside each downtime, in the same run: all KV loaded after the stop (``staged``: copied ahead to the source's staging
memory, and loaded by the destination when the request comes), and none moved (``recompute``).

A part that did not run keeps the figures that results/migration.json has.
"""

import argparse
import asyncio
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import overhead
from benchmarks.migration import simulated, transport
from benchmarks.migration.two_replicas import Handle, Streams, two_replicas
from benchmarks.migration.uneven import measure as measure_uneven
from benchmarks.record import finish, known
from cluster.core_client import ClusterCore
from cluster.migration import Rounds
from replicas.spec import EngineSpec

CONTEXTS = (256, 1024, 4096, 7500)
SLOPE_FROM = 1024
ROUNDS = {256: 5, 1024: 5, 4096: 3, 7500: 3}
STAGED_MOST, RECOMPUTED_MOST = 2048, 4096
"""Longest context that is moved so: beyond, the staging memory does not hold it, and a prompt takes minutes."""
SLOWDOWN_CONTEXT, SLOWDOWN_ROUNDS = 4096, 4
UNEVEN_REQUESTS, UNEVEN_RATE, UNEVEN_TURNS = 70, 0.7, 2
PARTS = ("downtime", "slowdown", "uneven")
BEFORE, AFTER = 24, 8
"""Tokens of a stream before it moves and after."""
CEILING_BLOCKS, REST_BLOCKS, GUARANTEE_BLOCKS = 100, 2, 66
IDS = range(1000, 40000)


def spec() -> EngineSpec:
    """The engine of ``benchmarks.overhead``, for longer contexts."""
    return replace(
        overhead.spec(elastic=True),
        max_model_len=8192,
        kv_ceiling_bytes=CEILING_BLOCKS * overhead.BLOCK_BYTES,
        kv_rest_bytes=REST_BLOCKS * overhead.BLOCK_BYTES,
        kv_guarantee_bytes=GUARANTEE_BLOCKS * overhead.BLOCK_BYTES,
        max_num_seqs=16,
    )


@dataclass
class Gaps:
    """Of one way to move, at one context: gaps at the switch, and normal ones before it, in seconds."""

    at_switch_s: list[float] = field(default_factory=list)
    normal_s: list[float] = field(default_factory=list)

    @property
    def steps(self) -> list[float]:
        """What is too much of each, in decode steps."""
        return [(gap - normal) / normal for gap, normal in zip(self.at_switch_s, self.normal_s, strict=True)]

    def to_json(self) -> dict[str, object]:
        steps = self.steps
        return {"downtime_steps": steps, "median": statistics.median(steps) if steps else None, "step_s": self.normal_s}


class Bench:
    """One run over two replicas. Requests start at "a" and move to "b"."""

    def __init__(self, core: ClusterCore, handle: Handle) -> None:
        self.core, self.handle, self.streams = core, handle, Streams(core)
        self._rng, self._names = random.Random(7), (f"r{number}" for number in itertools.count())

    async def downtimes(self, context: int, rounds: int) -> dict[str, Gaps]:
        found = {"live": Gaps(), "staged": Gaps(), "recompute": Gaps()}
        for number in range(rounds):
            for way, gaps in found.items():
                if number and way != "live":  # once is enough to show it
                    continue
                if (way == "staged" and context > STAGED_MOST) or (way == "recompute" and context > RECOMPUTED_MOST):
                    continue
                gap, normal = await self._move_one(context, way)
                gaps.at_switch_s.append(gap)
                gaps.normal_s.append(normal)
                print(f"  {way} at {context} tokens: {(gap - normal) / normal:.2f} steps of {1000 * normal:.0f} ms")
        return found

    async def _move_one(self, context: int, way: str) -> tuple[float, float]:
        name = await self._begin(context, 4 * BEFORE + 400)
        try:
            await self.streams.until(name, BEFORE)
            normal = statistics.median(gaps_of(self.streams.times[name][4:]))
            if way == "live":
                moved = await self.core.migrate(name, "b")
                assert moved.downtime_s is not None
                gap = moved.downtime_s
            elif way == "staged":
                gap = await self._staged(name)
            else:
                gap = await self._recomputed(name)
            await self.streams.until(name, len(self.streams.tokens[name]) + AFTER)
            return gap, normal
        finally:
            await self.streams.end(name)
            self.handle.first = "a"

    async def _staged(self, name: str) -> float:
        """One round into staging memory, of which the destination takes nothing ahead; then the switch."""
        relay = self.core._relays[name]
        block = self.core._info.block_tokens
        rounds = Rounds(self.core._errands.run_at, relay.request, relay.token_ids, "a", "b", block)
        relay.destination = "b"
        relay.landed.clear()
        try:
            await rounds._order()
            await rounds.switch()
            await asyncio.wait_for(relay.landed.wait(), 60)
        finally:
            relay.destination = None
            await rounds.end()
        return relay.downtime_s

    async def _recomputed(self, name: str) -> float:
        relay, self.handle.first = self.core._relays[name], "b"
        before = len(relay.token_ids)
        self.core._recall(relay, "no KV is to move")
        await self.streams.until(name, before + 1)
        return max(gaps_of(self.streams.times[name][before - 1 :]))

    async def slowdown(self, context: int, rounds: int) -> dict[str, list[float]]:
        """Of two short streams on each side, by side: the gap while a long context moves over that before."""
        ratios: dict[str, list[float]] = {"a": [], "b": []}
        for _ in range(rounds):
            others = {}
            for side in "aabb":
                self.handle.first = side
                others[await self._begin(128, 4000)] = side
            self.handle.first = "a"
            mover = await self._begin(context, 2000)
            await self.streams.until(mover, 8)
            calm_s = time.monotonic()
            await self.streams.until(mover, 40)
            began_s = time.monotonic()
            await self.core.migrate(mover, "b")
            ended_s = time.monotonic()
            for side in ratios:
                names = [name for name, where in others.items() if where == side]
                calm = [gap for name in names for gap in gaps_of(within(self.streams.times[name], calm_s, began_s))]
                moving = [gap for name in names for gap in gaps_of(within(self.streams.times[name], began_s, ended_s))]
                ratios[side].append(statistics.fmean(moving) / statistics.fmean(calm))
            slower = " and ".join(f"{side[-1]:.2f}" for side in ratios.values())
            print(f"  {ended_s - began_s:.1f} s; gaps of the others {slower} times as long")
            for name in (mover, *others):
                await self.streams.end(name)
        return ratios

    async def _begin(self, context: int, tokens: int) -> str:
        name = next(self._names)
        await self.streams.ask(name, self._rng.choices(IDS, k=context), tokens)
        await self.streams.until(name, 1)
        return name


def gaps_of(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def within(times: list[float], begin_s: float, end_s: float) -> list[float]:
    return [at_s for at_s in times if begin_s <= at_s <= end_s]


def steps_of(found: dict[int, dict[str, Gaps]], context: int) -> float:
    """The whole gap at the switch, in steps: median."""
    return statistics.median(found[context]["live"].steps) + 1


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="ellm-migration-") as folder:
        async with two_replicas(spec(), Path(folder)) as (core, handle):
            one = Bench(core, handle)
            await one._move_one(256, "live")  # the first of everything is slower
            yield one


async def measure_downtime(contexts: list[int]) -> tuple[dict[str, float], dict[str, Any]]:
    async with bench() as one:
        found = {context: await one.downtimes(context, ROUNDS.get(context, 3)) for context in contexts}
    everything = [steps for ways in found.values() for steps in ways["live"].steps]
    first = SLOPE_FROM if SLOPE_FROM in found else contexts[0]
    headline = {
        "downtime_steps_median": round(statistics.median(everything), 3),
    }
    if contexts[-1] > first:
        slope = steps_of(found, contexts[-1]) / steps_of(found, first) - 1
        headline["downtime_context_slope"] = round(slope, 3)
    return headline, {
        str(context): {way: gaps.to_json() for way, gaps in ways.items()} for context, ways in found.items()
    }


async def measure_slowdown(context: int, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    async with bench() as one:
        ratios = await one.slowdown(context, rounds)
    return {"slowdown_ratio": round(max(statistics.median(side) for side in ratios.values()), 3)}, {
        f"gaps at {side}": values for side, values in ratios.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.migration", description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS), help="tokens; ascending")
    parser.add_argument("--slowdown-rounds", type=int, default=SLOWDOWN_ROUNDS)
    parser.add_argument("--uneven-turns", type=int, default=UNEVEN_TURNS)
    parser.add_argument("--part", choices=PARTS, action="append", help="this one alone; repeat it")
    parser.add_argument("--simulate", action="store_true", help="instead: what moving is worth on simulated clusters")
    parser.add_argument("--transport", action="store_true", help="instead: bytes a second that KV moves at")
    options = parser.parse_args()
    if options.simulate or options.transport:
        (simulated if options.simulate else transport).run()
        return
    contexts = sorted(options.contexts)
    work = {
        "downtime": lambda: measure_downtime(contexts),
        "slowdown": lambda: measure_slowdown(min(SLOWDOWN_CONTEXT, contexts[-1]), options.slowdown_rounds),
        "uneven": lambda: measure_uneven(UNEVEN_REQUESTS, UNEVEN_RATE, options.uneven_turns),
    }
    details = known("migration")
    for part in options.part or PARTS:
        print(part)
        figures, found = asyncio.run(work[part]())
        details[part] = {"figures": figures, **found}
        finish("migration", {key: value for one in details.values() for key, value in one["figures"].items()}, details)


if __name__ == "__main__":
    main()
