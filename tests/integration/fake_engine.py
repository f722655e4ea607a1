"""An engine without a model: follows its lease with a memory file, by the board's protocol. Run as its own process.

    python fake_engine.py BOARD ROW      then on stdin: "demand BYTES" lines; it ends at the end of stdin

It commits and gives back real pages, so that what tests sample from the operating system is what an engine would hold.
"""

import os
import select
import sys

from memory_agent.lease_board import LIMIT_UNIT_BYTES, EngineWord, LeaseBoard, Row

STEP_S = 0.005
STEP_BYTES = 64 * LIMIT_UNIT_BYTES
"""Most bytes moved in one step: moves take several steps, as in an engine."""
FLOOR_BYTES = 16 * LIMIT_UNIT_BYTES
"""What it would keep at rest: the rest of its guarantee is lent."""


def resize(fd: int, size_bytes: int) -> None:
    """Hold exactly ``size_bytes`` of memory in the file."""
    grown = size_bytes > os.fstat(fd).st_size
    os.ftruncate(fd, size_bytes)
    if grown:
        os.posix_fallocate(fd, 0, size_bytes)


def step(row: Row, fd: int, demand: int) -> None:
    lease = row.lease
    held = os.fstat(fd).st_size
    goal = min(demand, lease.limit_bytes)
    size = min(goal, held + STEP_BYTES) if goal > held else max(goal, held - STEP_BYTES)
    # What is about to be held is on the board before it is held; what was given back leaves the board after.
    row.set(EngineWord.COMMITTED_BYTES, max(held, size))
    resize(fd, size)
    row.set(EngineWord.COMMITTED_BYTES, size)
    row.set(EngineWord.USED_BYTES, size)
    row.set(EngineWord.DEMAND_BYTES, demand)
    row.set(EngineWord.STEPS, row.get(EngineWord.STEPS) + 1)
    row.set(EngineWord.APPLIED_REVISION, lease.revision)


def main() -> None:
    row = LeaseBoard.open(sys.argv[1]).row(int(sys.argv[2]))
    fd = os.memfd_create("kv")
    row.set(EngineWord.WORKER_PID_0, os.getpid())
    row.set(EngineWord.WORKER_FD_0, fd)
    row.set(EngineWord.WORKER_COUNT, 1)
    row.set(EngineWord.BLOCK_BYTES, LIMIT_UNIT_BYTES)
    row.set(EngineWord.BLOCKS_CEILING, 2**20)
    row.set(EngineWord.FLOOR_BYTES, FLOOR_BYTES)
    row.set(EngineWord.PID, os.getpid())
    demand = 0
    while True:
        if select.select([sys.stdin], [], [], STEP_S)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            demand = int(line.split()[1])
        step(row, fd, demand)


if __name__ == "__main__":
    main()
