"""Reports: the board's words beside what the kernel says."""

import os
import pickle

from memory_agent.device_report import DeviceReporter
from memory_agent.lease_board import NO_FD, EngineWord, ReplicaWord
from memory_agent.lease_keeper import LeaseKeeper
from memory_agent.reports import PressureLevel
from tests.unit.memory_agent.board_players import BUDGET, GUARANTEE, UNIT, Clock, appear, terms


def test_report_shows_board_and_kernel(keeper: LeaseKeeper, clock: Clock) -> None:
    """A report carries the engine's words beside what the kernel says of its memory file and processes."""
    fd = os.memfd_create("kv")
    os.pwrite(fd, b"x" * (8 * UNIT), 0)
    row = keeper.register(terms("a"))
    appear(row, os.getpid(), workers=((os.getpid(), fd),))
    row.set(EngineWord.COMMITTED_BYTES, 8 * UNIT)
    row.set(EngineWord.USED_BYTES, 5 * UNIT)
    row.set(EngineWord.BLOCKS_CEILING, 20)
    row.set(ReplicaWord.TARGET_REVISION, 4)
    row.set_float(EngineWord.KV_TOKEN_S, 1e-7)
    row.set_float(EngineWord.TPOT_S, 0.03)
    row.set(EngineWord.MAX_NUM_SEQS, 64)
    clock.tick(3)
    reporter = DeviceReporter("node", "cpu", 7, epoch_ns=9)
    first, second = reporter.sample(keeper, 1.0), reporter.sample(keeper, 2.0)
    os.close(fd)
    (engine,) = first.engines
    assert (engine.held_bytes_os, engine.committed_bytes, engine.used_bytes) == (8 * UNIT, 8 * UNIT, 5 * UNIT)
    assert (engine.reachable_blocks, engine.kv_usage) == (20, 0.25), "the lease reaches beyond the ceiling of 20 blocks"
    assert engine.rss_bytes > 1 << 20
    assert (engine.state, engine.target_revision, engine.weights_bytes) == ("LIVE", 4, 1 << 20)
    assert (engine.kv_token_s, engine.tpot_s, engine.max_num_seqs) == (1e-7, 0.03, 64)
    assert (first.node, first.device, first.agent_pid, first.budget_bytes) == ("node", "cpu", 7, BUDGET)
    assert (first.agent_epoch_ns, first.sequence) < (second.agent_epoch_ns, second.sequence)
    assert pickle.loads(pickle.dumps(first)) == first


def test_memory_without_a_file_is_reported_as_the_engine_counts_it(keeper: LeaseKeeper, clock: Clock) -> None:
    """No system counts a GPU's memory for a process: what is held is what the engine says of its KV memory."""
    row = keeper.register(terms("a"))
    appear(row, os.getpid(), workers=((os.getpid(), NO_FD),))
    row.set(EngineWord.COMMITTED_BYTES, 8 * UNIT)
    row.set(EngineWord.ACTIVATION_BYTES, 3 * UNIT)
    clock.tick(3)
    (engine,) = DeviceReporter("node", "gpu0", 7, epoch_ns=9).sample(keeper, 1.0).engines
    assert (engine.held_bytes_os, engine.committed_bytes, engine.activation_bytes) == (5 * UNIT, 5 * UNIT, 3 * UNIT)


def test_what_is_lent_and_borrowed_is_counted(keeper: LeaseKeeper, clock: Clock) -> None:
    """An engine alone borrows all that nobody wants; when a second one wants its bytes, the first falls back below its
    guarantee, and that is lent. The bytes are those by which the limits changed beyond the guarantee."""
    first = keeper.register(terms("a"))
    appear(first, os.getpid())
    clock.tick(100, first)
    reporter = DeviceReporter("node", "cpu", 7, epoch_ns=9)
    (alone,) = reporter.sample(keeper, 1.0).engines
    assert (alone.borrow_count, alone.borrow_bytes, alone.lend_count) == (1, BUDGET - GUARANTEE, 0)
    second = keeper.register(terms("b"))
    appear(second, os.getpid())
    second.set(EngineWord.DEMAND_BYTES, BUDGET)
    clock.tick(200, first, second)
    lender, borrower = reporter.sample(keeper, 2.0).engines
    assert lender.lend_count > 0 and lender.lend_bytes == GUARANTEE - lender.limit_bytes > 0
    assert borrower.borrow_bytes == borrower.limit_bytes - GUARANTEE > 0
    assert lender.borrow_bytes == alone.borrow_bytes


def test_a_level_is_told_with_its_beginning(keeper: LeaseKeeper, clock: Clock) -> None:
    """The time from which an engine and its device have had their level stays while the level does; the next life of
    the agent counts from its own first report."""
    row = keeper.register(terms("a"))
    appear(row, os.getpid())
    clock.tick(3, row)
    reporter = DeviceReporter("node", "cpu", 7, epoch_ns=9)
    calm = [reporter.sample(keeper, wall_s) for wall_s in (10.0, 11.0)]
    assert [one.pressure_since_s for one in calm] == [10.0, 10.0]
    row.set(EngineWord.DEMAND_BYTES, 2 * BUDGET)
    clock.tick(3, row)
    pressed = [reporter.sample(keeper, wall_s) for wall_s in (12.0, 13.0)]
    assert [one.pressure_since_s for one in pressed] == [12.0, 12.0]
    assert [one.engines[0].pressure_since_s for one in (*calm, *pressed)] == [10.0, 10.0, 12.0, 12.0]
    assert pressed[0].pressure is PressureLevel.CRITICAL
    assert DeviceReporter("node", "cpu", 8, epoch_ns=10).sample(keeper, 14.0).pressure_since_s == 14.0
