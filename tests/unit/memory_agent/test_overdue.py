"""Reclaiming from an engine that does not give back: it keeps its bytes, and after a bounded time everybody is told."""

import logging
import os

import pytest

from memory_agent.device_report import sample_engine
from memory_agent.lease_board import EngineWord, Row, RowState
from memory_agent.lease_keeper import LeaseKeeper
from memory_agent.reports import PressureLevel
from memory_agent.tenant import RECLAIM_S
from tests.unit.memory_agent.board_players import BUDGET, FLOOR, UNIT, Clock, Processes, appear, follow, terms

TICKS = round(RECLAIM_S / 0.05)


@pytest.fixture
def rows(keeper: LeaseKeeper, clock: Clock) -> list[Row]:
    """Engine "a" holds most of the budget, which "b" now asks for."""
    rows = [keeper.register(terms("a")), keeper.register(terms("b"))]
    for row in rows:
        appear(row, os.getpid())
    rows[0].set(EngineWord.DEMAND_BYTES, BUDGET // 2)
    clock.tick(3, *rows)
    rows[0].set(EngineWord.DEMAND_BYTES, 0)
    rows[1].set(EngineWord.DEMAND_BYTES, BUDGET)
    return rows


def level(keeper: LeaseKeeper, index: int) -> PressureLevel:
    return keeper.tenants[index].pressure.level


def test_an_engine_that_does_not_give_back_is_overdue(
    keeper: LeaseKeeper, clock: Clock, rows: list[Row], caplog: pytest.LogCaptureFixture
) -> None:
    """After RECLAIM_S it is CRITICAL, so that it gets no requests, reported and logged once; nothing is taken from it,
    and when it gives back all of that ends."""
    held = rows[0].lease.limit_bytes
    clock.tick(TICKS // 2, rows[1])
    assert (level(keeper, 0), keeper.tenants[0].overdue_bytes) == (PressureLevel.NORMAL, 0)
    with caplog.at_level(logging.INFO):
        clock.tick(TICKS, rows[1])
    assert level(keeper, 0) is PressureLevel.CRITICAL
    assert sample_engine(keeper.tenants[0]).overdue_bytes == held - FLOOR
    assert len([line for line in caplog.messages if "engine a has owed" in line]) == 1
    assert rows[1].lease.limit_bytes == BUDGET - held
    follow(rows[0])
    clock.tick(5, *rows)
    assert rows[1].lease.limit_bytes == BUDGET - FLOOR
    assert (level(keeper, 0), keeper.tenants[0].overdue_bytes) == (PressureLevel.NORMAL, 0)


def test_a_slow_engine_that_gives_back_bit_by_bit_is_not_overdue(
    keeper: LeaseKeeper, clock: Clock, rows: list[Row]
) -> None:
    """Progress counts, however long the whole of it takes."""
    for held in range(BUDGET // 2, FLOOR, -10 * UNIT):
        rows[0].set(EngineWord.COMMITTED_BYTES, held)
        rows[0].set(EngineWord.APPLIED_REVISION, rows[0].lease.revision)
        clock.tick(TICKS // 2, rows[1])
        assert keeper.tenants[0].overdue_bytes == 0


def test_time_in_which_the_agent_was_away_makes_nobody_late(keeper: LeaseKeeper, clock: Clock, rows: list[Row]) -> None:
    """A gap of an hour in the agent's clock, as of a suspended machine, neither reclaims nor ends nor accuses
    anything."""
    clock.tick(2, rows[1])
    before = [rows[0].state, rows[1].state, rows[1].lease]
    clock.now_s += 3600.0
    clock.tick(2)
    assert [rows[0].state, rows[1].state, rows[1].lease] == before
    assert keeper.tenants[0].overdue_bytes == 0
    follow(rows[0])
    clock.tick(3, *rows)
    assert rows[1].lease.limit_bytes == BUDGET - FLOOR


def test_a_worker_that_outlives_its_engine_is_overdue(keeper: LeaseKeeper, clock: Clock, processes: Processes) -> None:
    """What a row on its way out still holds is owed as a whole."""
    engine, worker = processes.start(), processes.start()
    row = keeper.register(terms("a"))
    appear(row, engine.pid, workers=((worker.pid, 0),))
    clock.tick(3, row)
    processes.end(engine)
    clock.until(lambda: row.state is RowState.LEAVING)
    clock.tick(TICKS + 1)
    assert keeper.tenants[0].overdue_bytes == BUDGET
