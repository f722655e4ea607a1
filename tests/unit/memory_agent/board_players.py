"""Who plays around a lease board in tests: processes that stand for engines, an engine's words, the agent's ticks."""

import os
import subprocess
import time
from collections.abc import Callable

from memory_agent.lease_board import LIMIT_UNIT_BYTES, MAX_ROWS, EngineWord, Row
from memory_agent.lease_keeper import LeaseKeeper
from memory_agent.tenant import EngineTerms

UNIT = LIMIT_UNIT_BYTES
BUDGET = 1024 * UNIT
GUARANTEE = 100 * UNIT
FLOOR = 20 * UNIT
WEIGHTS = 16 * UNIT
ROOM = MAX_ROWS * WEIGHTS
"""Set aside for weights: those of a full board."""


class Processes:
    """Starts processes that stand for engines and workers, and ends them."""

    def __init__(self) -> None:
        self._all: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        self._all.append(subprocess.Popen(["sleep", "600"]))
        return self._all[-1]

    def end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()

    def close(self) -> None:
        for process in self._all:
            self.end(process)


def terms(
    engine_id: str, registrar_pid: int | None = None, guarantee: int = GUARANTEE, weight: float = 1, start: int = 0
) -> EngineTerms:
    return EngineTerms(engine_id, "model", guarantee, BUDGET, WEIGHTS, registrar_pid or os.getpid(), weight, start)


def appear(row: Row, pid: int, workers: tuple[tuple[int, int], ...] = ()) -> None:
    """What an engine does when its processes are up."""
    for index, (worker, fd) in enumerate(workers):
        row.set(EngineWord.WORKER_PID_0 + index, worker)
        row.set(EngineWord.WORKER_FD_0 + index, fd)
    row.set(EngineWord.WORKER_COUNT, len(workers))
    row.set(EngineWord.BLOCK_BYTES, UNIT)
    row.set(EngineWord.BLOCKS_CEILING, BUDGET // UNIT)
    row.set(EngineWord.FLOOR_BYTES, FLOOR)
    row.set(EngineWord.PID, pid)


def follow(row: Row) -> None:
    """What an honest engine does in one step."""
    lease = row.lease
    row.set(EngineWord.COMMITTED_BYTES, min(row.get(EngineWord.DEMAND_BYTES), lease.limit_bytes))
    row.set(EngineWord.APPLIED_REVISION, lease.revision)


class Clock:
    """Ticks of the control loop in simulated time."""

    def __init__(self, keeper: LeaseKeeper) -> None:
        self.keeper = keeper
        self.now_s = 1000.0

    def tick(self, rounds: int = 1, *rows: Row) -> bool:
        changed = False
        for _ in range(rounds):
            self.now_s += 0.05
            changed |= self.keeper.tick(self.now_s)
            for row in rows:
                follow(row)
        return changed

    def until(self, condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "did not happen in time"
            self.tick()
            time.sleep(0.005)
