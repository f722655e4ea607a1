"""Variants run in turns: while one's engines run, the others' are stopped (SIGSTOP), and so are their clocks.

A shared machine is faster and slower by the second. Turns of half a second hand that to all variants alike, and a clock
that counts only a variant's own turns makes open loops and latencies as meaningful as if it had the machine alone.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeVar

from benchmarks.overhead import SLICE_S, Gate
from replicas.local_engine import LocalEngine

_LOOK_S = 0.02
"""How often a sleeper looks whether its variant has become idle."""

_Result = TypeVar("_Result")


class TurnClock:
    """Seconds of a variant's own turns. Stands still at first.

    Attributes:
        idle: the variant has nothing to do. Who sleeps then wakes at once, and the clock has jumped there.
    """

    def __init__(self) -> None:
        self.idle: Callable[[], bool] = lambda: False
        self._before_s = 0.0
        self._started_s: float | None = None
        self._running = asyncio.Event()

    def now(self) -> float:
        current = time.perf_counter() - self._started_s if self._started_s is not None else 0.0
        return self._before_s + current

    async def sleep_until(self, at_s: float) -> None:
        while (left_s := at_s - self.now()) > 0:
            await self._running.wait()
            await asyncio.sleep(min(left_s, _LOOK_S))  # at least one turn of the loop: who has just been sent starts
            if self.idle():
                self._before_s += max(0.0, at_s - self.now())

    def start(self) -> None:
        self._started_s = time.perf_counter()
        self._running.set()

    def stop(self) -> None:
        self._before_s, self._started_s = self.now(), None
        self._running.clear()


@dataclass
class Player:
    """One variant: its engines, which run and stop together, and their clock."""

    engines: Sequence[LocalEngine]
    clock: TurnClock = field(default_factory=TurnClock)


async def in_turns(
    players: Mapping[str, Player], loads: Mapping[str, Coroutine[None, None, _Result]]
) -> dict[str, _Result]:
    """Run each player's load, in turns of SLICE_S seconds, until all have ended. Players without a load stay stopped.
    Raises what a load raises."""
    with ExitStack() as stack:
        gates = {
            name: [stack.enter_context(Gate(engine)) for engine in player.engines] for name, player in players.items()
        }
        tasks = {name: asyncio.create_task(load) for name, load in loads.items()}
        try:
            while waiting := [name for name, task in tasks.items() if not task.done()]:
                for name in waiting:
                    await _turn(gates[name], players[name].clock, tasks[name])
        finally:
            for task in tasks.values():
                task.cancel()
        return {name: task.result() for name, task in tasks.items()}


async def _turn(gates: Sequence[Gate], clock: TurnClock, task: "asyncio.Task[_Result]") -> None:
    with ExitStack() as stack:
        for gate in gates:
            stack.enter_context(gate.open())
        clock.start()
        await asyncio.wait([task], timeout=SLICE_S)
        clock.stop()
