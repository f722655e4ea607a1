"""The life of a row, with real processes: registration, exits of engine, worker and registrar, unregistering."""

import os
import subprocess
import sys

from memory_agent.lease_board import EngineWord, RowState
from memory_agent.lease_keeper import LeaseKeeper
from memory_agent.processes import SHM
from memory_agent.staging import segments_of
from tests.unit.memory_agent.board_players import BUDGET, Clock, Processes, appear, terms


def test_dead_engine_gives_its_bytes_back(keeper: LeaseKeeper, clock: Clock, processes: Processes) -> None:
    """The exit of a live engine clears its row, is counted, its bytes are lent to others, its segments go: those
    of its host buffer, and those of requests that were to leave it."""
    engine = processes.start()
    dying, other = keeper.register(terms("a")), keeper.register(terms("b"))
    appear(dying, engine.pid)
    appear(other, os.getpid())
    clock.tick(3, dying, other)
    assert other.lease.limit_bytes == BUDGET // 2
    left, alive = (
        [file for rank in (0, 1) for file in segments_of(keeper.board.path, row.index, rank)] for row in (dying, other)
    )
    for file in (*left, *alive):
        file.touch()
    processes.end(engine)
    clock.until(lambda: dying.state is RowState.FREE)
    clock.tick(2, other)
    assert other.lease.limit_bytes == BUDGET
    assert keeper.board.dead_engines == 1
    assert not any(file.exists() for file in left) and all(file.exists() for file in alive)
    assert [tenant.engine_id for tenant in keeper.tenants] == ["b"]


def test_a_killed_engines_shared_memory_goes(keeper: LeaseKeeper, clock: Clock, processes: Processes) -> None:
    """What its processes had mapped of Python's shared memory; a file of the same kind that others use stays."""
    code = (
        "import mmap, sys; file = open(sys.argv[1], 'r+b'); held = mmap.mmap(file.fileno(), 4096); "
        "print(1, flush=True); input()"
    )
    mapped, foreign = (SHM / f"psm_{os.getpid()}_{name}" for name in ("mapped", "foreign"))
    for file in (mapped, foreign):
        file.write_bytes(bytes(4096))
    try:
        command = [sys.executable, "-c", code, str(mapped)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as engine:
            assert engine.stdout is not None
            engine.stdout.readline()
            row = keeper.register(terms("a"))
            appear(row, engine.pid)
            clock.tick(3, row)
            engine.kill()
        clock.until(lambda: row.state is RowState.FREE)
        assert (mapped.exists(), foreign.exists()) == (False, True)
    finally:
        for file in (mapped, foreign):
            file.unlink(missing_ok=True)


def test_worker_that_lives_on_keeps_its_bytes(keeper: LeaseKeeper, clock: Clock, processes: Processes) -> None:
    """After the scheduler process has died, nothing is lent while a worker may still hold the memory."""
    engine, worker = processes.start(), processes.start()
    dying, other = keeper.register(terms("a")), keeper.register(terms("b"))
    appear(dying, engine.pid, workers=((worker.pid, 0),))
    appear(other, os.getpid())
    dying.set(EngineWord.DEMAND_BYTES, BUDGET)
    other.set(EngineWord.DEMAND_BYTES, BUDGET)
    clock.tick(5, dying, other)
    assert dying.get(EngineWord.COMMITTED_BYTES) == BUDGET // 2
    processes.end(engine)
    clock.until(lambda: dying.state is RowState.LEAVING)
    clock.tick(20, other)
    assert other.lease.limit_bytes == BUDGET // 2
    processes.end(worker)
    clock.until(lambda: dying.state is RowState.FREE)
    clock.tick(1, other)
    assert other.lease.limit_bytes == BUDGET
    assert keeper.board.dead_engines == 1


def test_starting_row_dies_with_its_registrar(keeper: LeaseKeeper, clock: Clock, processes: Processes) -> None:
    """A registrar that exits before its engine is up frees the row; once the engine is up its exit frees nothing."""
    early, late = processes.start(), processes.start()
    lost, safe = keeper.register(terms("a", early.pid)), keeper.register(terms("b", late.pid))
    appear(safe, os.getpid())
    clock.tick()
    processes.end(early)
    processes.end(late)
    clock.until(lambda: lost.state is RowState.FREE)
    clock.tick(5)
    assert safe.state is RowState.LIVE
    assert keeper.board.dead_engines == 1


def test_engine_that_dies_right_after_it_appeared(keeper: LeaseKeeper, clock: Clock, processes: Processes) -> None:
    """An engine whose process is gone before the agent first looks is noticed all the same."""
    engine = processes.start()
    row = keeper.register(terms("a"))
    processes.end(engine)
    appear(row, engine.pid)
    clock.tick(2)
    assert row.state is RowState.FREE
    assert keeper.board.dead_engines == 1


def test_unregistered_engine_is_no_death(keeper: LeaseKeeper, clock: Clock, processes: Processes) -> None:
    """After unregister the bytes stay reserved until the process has exited, and that exit is not counted."""
    engine = processes.start()
    leaving, other = keeper.register(terms("a")), keeper.register(terms("b"))
    appear(leaving, engine.pid)
    appear(other, os.getpid())
    clock.tick(3, leaving, other)
    keeper.unregister("a")
    keeper.unregister("a")
    clock.tick(20, other)
    assert (leaving.state, other.lease.limit_bytes) == (RowState.LEAVING, BUDGET // 2)
    processes.end(engine)
    clock.until(lambda: leaving.state is RowState.FREE)
    clock.tick(1, other)
    assert (other.lease.limit_bytes, keeper.board.dead_engines) == (BUDGET, 0)


def test_unregistered_before_it_came_up(keeper: LeaseKeeper) -> None:
    """A row that never saw its engine is free at once, and the same engine may register again."""
    row = keeper.register(terms("a"))
    keeper.unregister("a")
    assert row.state is RowState.FREE
    assert keeper.register(terms("a")).state is RowState.STARTING


def test_next_life_of_an_engine_does_not_inherit_a_dying_row(keeper: LeaseKeeper, processes: Processes) -> None:
    """An engine that registers again right after its process died gets a fresh row, before any tick has noticed."""
    engine = processes.start()
    row = keeper.register(terms("a"))
    appear(row, engine.pid)
    keeper.tick(1.0)
    processes.end(engine)
    fresh = keeper.register(terms("a"))
    assert (fresh.state, fresh.get(EngineWord.PID)) == (RowState.STARTING, 0)
    assert len(keeper.tenants) == 1


def test_freed_row_has_no_ties_to_its_old_processes(keeper: LeaseKeeper, clock: Clock, processes: Processes) -> None:
    """The exit of a process that once belonged to a row does nothing to the row, free or let anew."""
    old = processes.start()
    before = len(os.listdir("/proc/self/fd"))
    row = keeper.register(terms("a", old.pid))
    keeper.unregister("a")
    assert len(os.listdir("/proc/self/fd")) == before
    processes.end(old)
    clock.tick(3)
    assert keeper.register(terms("b")).index == row.index
    clock.tick(3)
    assert (row.engine_id, row.state, keeper.board.dead_engines) == ("b", RowState.STARTING, 0)


def test_same_engine_registers_while_its_old_process_leaves(keeper: LeaseKeeper, clock: Clock) -> None:
    """A row on its way out is not handed to the next life of the same engine."""
    old = keeper.register(terms("a"))
    appear(old, os.getpid())
    clock.tick()
    keeper.unregister("a")
    assert keeper.register(terms("a")).index != old.index
