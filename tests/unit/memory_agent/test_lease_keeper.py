"""Leases on a real board: guarantees, lending, stopped engines, pressure; what is refused, with the numbers."""

import os
import signal

import pytest

from memory_agent.errors import SettingsError
from memory_agent.lease_board import MAX_ROWS, AgentWord, EngineWord, RowState
from memory_agent.lease_keeper import LeaseKeeper
from memory_agent.reports import PressureLevel
from memory_agent.tenant import LEND_AFTER_S
from tests.unit.memory_agent.board_players import BUDGET, FLOOR, GUARANTEE, UNIT, Clock, Processes, appear, terms


def test_registered_engine_holds_its_guarantee(keeper: LeaseKeeper, clock: Clock) -> None:
    """A row is STARTING with its guarantee as limit at once, and is lent nothing before it is LIVE."""
    row = keeper.register(terms("a"))
    clock.tick(5)
    assert (row.engine_id, row.state, row.lease.limit_bytes) == ("a", RowState.STARTING, GUARANTEE)
    appear(row, os.getpid())
    clock.tick(2)
    assert (row.state, row.lease.limit_bytes) == (RowState.LIVE, BUDGET)


def test_registering_again_changes_nothing(keeper: LeaseKeeper) -> None:
    """The same engine gets the row it has, its lease untouched."""
    row = keeper.register(terms("a"))
    before = row.lease
    assert keeper.register(terms("a")).index == row.index
    assert row.lease == before
    assert len(keeper.tenants) == 1


def test_newcomer_takes_its_guarantee_from_what_was_lent(keeper: LeaseKeeper, clock: Clock) -> None:
    """A second engine's guarantee comes from the first one's lent bytes, only after that one acknowledged."""
    first = keeper.register(terms("a"))
    appear(first, os.getpid())
    clock.tick(2, first)
    assert first.lease.limit_bytes == BUDGET
    second = keeper.register(terms("b"))
    assert (first.lease.limit_bytes, second.lease.limit_bytes) == (BUDGET - GUARANTEE, 0)
    assert second.get(AgentWord.TARGET_BYTES) == GUARANTEE
    clock.tick(3)
    assert second.lease.limit_bytes == 0
    clock.tick(2, first)
    assert second.lease.limit_bytes == GUARANTEE


def test_stopped_engine_keeps_its_bytes(keeper: LeaseKeeper, clock: Clock, processes: Processes) -> None:
    """A stopped process says nothing and gives nothing back: its exposure stays, however much another asks for."""
    engine = processes.start()
    stopped, asking = keeper.register(terms("a")), keeper.register(terms("b"))
    appear(stopped, engine.pid)
    appear(asking, os.getpid())
    clock.tick(3, stopped, asking)
    engine.send_signal(signal.SIGSTOP)
    asking.set(EngineWord.DEMAND_BYTES, BUDGET)
    clock.tick(100, asking)
    assert stopped.state is RowState.LIVE
    assert asking.lease.limit_bytes == BUDGET // 2
    assert asking.get(AgentWord.TARGET_BYTES) == BUDGET - FLOOR


def test_demand_moves_the_leases_between_two_engines(keeper: LeaseKeeper, clock: Clock) -> None:
    """One engine exceeds 70 % of the budget while the other idles, and gives it back when the other needs it."""
    rows = [keeper.register(terms("a")), keeper.register(terms("b"))]
    for row in rows:
        appear(row, os.getpid())
    rows[0].set(EngineWord.DEMAND_BYTES, BUDGET)
    clock.tick(5, *rows)
    assert rows[0].get(EngineWord.COMMITTED_BYTES) > 0.7 * BUDGET
    rows[1].set(EngineWord.DEMAND_BYTES, BUDGET)
    clock.tick(5, *rows)
    assert [row.get(EngineWord.COMMITTED_BYTES) for row in rows] == [BUDGET // 2, BUDGET // 2]


def test_pressure_change_is_announced_once(keeper: LeaseKeeper, clock: Clock) -> None:
    """tick is True exactly when a level changed: demand beyond what can be had, and its end."""
    row = keeper.register(terms("a"))
    appear(row, os.getpid())
    assert not clock.tick(3, row)
    row.set(EngineWord.DEMAND_BYTES, 2 * BUDGET)
    assert clock.tick(2, row)
    assert (keeper.pressure.level, keeper.tenants[0].pressure.level) == (PressureLevel.CRITICAL, PressureLevel.CRITICAL)
    assert not clock.tick(20, row)
    row.set(EngineWord.DEMAND_BYTES, 0)
    assert clock.tick(20, row)
    assert (keeper.pressure.level, keeper.tenants[0].pressure.level) == (PressureLevel.NORMAL, PressureLevel.NORMAL)


def test_a_quiet_device_still_notices_everything(keeper: LeaseKeeper, clock: Clock, processes: Processes) -> None:
    """After long quiet, when ticks do next to nothing, demand, a new budget and an exit are acted on at once."""
    engine = processes.start()
    row, other = keeper.register(terms("a")), keeper.register(terms("b"))
    appear(row, os.getpid())
    appear(other, engine.pid)
    row.set(EngineWord.DEMAND_BYTES, 300 * UNIT)
    clock.tick(100, row, other)
    levels = [keeper.pressure.level]
    keeper.set_budget(320 * UNIT)
    assert clock.tick(2, row, other)
    assert [*levels, keeper.pressure.level] == [PressureLevel.NORMAL, PressureLevel.ELEVATED]
    keeper.set_budget(BUDGET)
    row.set(EngineWord.DEMAND_BYTES, 0)
    clock.tick(100, row, other)
    row.set(EngineWord.DEMAND_BYTES, BUDGET)
    clock.tick(2, row, other)
    assert row.lease.limit_bytes == BUDGET - FLOOR
    clock.tick(100, row, other)
    processes.end(engine)
    clock.until(lambda: other.state is RowState.FREE)
    clock.tick(1, row)
    assert row.lease.limit_bytes == BUDGET


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"guarantee": BUDGET + 1}, "ceiling"),
        ({"guarantee": 0}, "0 < guarantee <= ceiling"),
        ({"weight": 0.0}, "weight 0.0"),
        ({"engine_id": "x" * 128}, "128 bytes; 1 to 127 fit"),
        ({"engine_id": ""}, "0 bytes"),
        ({"registrar_pid": 2**22 + 1}, "registrar_pid 4194305 is no process"),
    ],
)
def test_impossible_terms_are_refused(keeper: LeaseKeeper, engine: dict[str, object], message: str) -> None:
    """Terms that cannot work raise SettingsError with the cause, and leave the board as it was."""
    with pytest.raises(SettingsError, match=message):
        keeper.register(terms(**({"engine_id": "a"} | engine)))  # type: ignore[arg-type]
    assert list(keeper.board.rows()) == []


def test_guarantees_beyond_the_budget_are_refused(keeper: LeaseKeeper) -> None:
    """One engine too many is refused with the numbers; those that are there keep what they have."""
    row = keeper.register(terms("a", guarantee=600 * UNIT))
    before = row.lease
    with pytest.raises(SettingsError, match=f"need {1200 * UNIT} bytes.*is {BUDGET}"):
        keeper.register(terms("b", guarantee=600 * UNIT))
    assert row.lease == before
    assert len(list(keeper.board.rows())) == 1


def test_full_board_is_an_error(keeper: LeaseKeeper) -> None:
    """More engines than rows raise SettingsError with the number of rows."""
    for index in range(MAX_ROWS):
        keeper.register(terms(str(index), guarantee=1))
    with pytest.raises(SettingsError, match="32 engines share it"):
        keeper.register(terms("one too many", guarantee=1))


def test_budget_and_limits_are_checked(keeper: LeaseKeeper, clock: Clock) -> None:
    """A budget below the guarantees, a ceiling below its guarantee, guarantees beyond the budget and an unknown engine
    are refused with what would fit, and change nothing."""
    rows = [keeper.register(terms("a")), keeper.register(terms("b"))]
    with pytest.raises(SettingsError, match=f"{2 * GUARANTEE} bytes or more"):
        keeper.set_budget(2 * GUARANTEE - 1)
    for guarantee, ceiling in ((GUARANTEE, GUARANTEE - 1), (0, GUARANTEE)):
        with pytest.raises(SettingsError, match="0 < guarantee <= ceiling is needed"):
            keeper.set_limits("a", guarantee, ceiling)
    with pytest.raises(SettingsError, match=f"a budget of {BUDGET + UNIT} bytes or more"):
        keeper.set_limits("a", BUDGET - GUARANTEE + UNIT, BUDGET)
    with pytest.raises(SettingsError, match=r"no engine c.*registered are: a, b"):
        keeper.set_limits("c", GUARANTEE, BUDGET)
    for row in rows:
        appear(row, os.getpid())
        assert row.get(AgentWord.GUARANTEE_BYTES) == GUARANTEE
    keeper.set_limits("a", GUARANTEE, 200 * UNIT)
    clock.tick(5, *rows)
    assert [row.lease.limit_bytes for row in rows] == [200 * UNIT, 824 * UNIT]
    keeper.set_budget(2 * GUARANTEE)
    clock.tick(5, *rows)
    assert [row.lease.limit_bytes for row in rows] == [GUARANTEE, GUARANTEE]


def test_a_ceiling_below_what_is_held_shrinks_by_the_protocol(keeper: LeaseKeeper, clock: Clock) -> None:
    """The limit falls at once; the neighbour's rises only when the bytes have really been given back."""
    rows = [keeper.register(terms("a")), keeper.register(terms("b"))]
    for row in rows:
        appear(row, os.getpid())
        row.set(EngineWord.DEMAND_BYTES, BUDGET)
    clock.tick(10, *rows)
    held = rows[0].get(EngineWord.COMMITTED_BYTES)
    assert held == BUDGET // 2
    keeper.set_limits("a", GUARANTEE, GUARANTEE)
    clock.tick(5, rows[1])
    assert [row.lease.limit_bytes for row in rows] == [GUARANTEE, BUDGET - held]
    clock.tick(5, *rows)
    assert [row.lease.limit_bytes for row in rows] == [GUARANTEE, BUDGET - GUARANTEE]


def test_a_guarantee_that_nobody_asks_for_is_lent_and_comes_back(keeper: LeaseKeeper, clock: Clock) -> None:
    """A while after its last request an engine keeps its floor alone; when it asks again it gets of its guarantee what
    it needs, though its neighbour wants everything, and that is no pressure."""
    rows = [keeper.register(terms("a")), keeper.register(terms("b"))]
    for row in rows:
        appear(row, os.getpid())
        row.set(EngineWord.DEMAND_BYTES, BUDGET)
    clock.tick(10, *rows)
    rows[0].set(EngineWord.DEMAND_BYTES, FLOOR)
    clock.tick(round(0.9 * LEND_AFTER_S / 0.05), *rows)
    assert rows[0].lease.limit_bytes >= GUARANTEE
    clock.tick(round(2 * LEND_AFTER_S / 0.05), *rows)
    assert [row.lease.limit_bytes for row in rows] == [FLOOR, BUDGET - FLOOR]
    rows[0].set(EngineWord.DEMAND_BYTES, 80 * UNIT)
    clock.tick(4, *rows)
    assert [row.lease.limit_bytes for row in rows] == [80 * UNIT, BUDGET - 80 * UNIT]
    assert keeper.tenants[0].pressure.level < PressureLevel.CRITICAL


def test_short_requests_below_the_guarantee_rarely_change_a_limit(keeper: LeaseKeeper, clock: Clock) -> None:
    """One every second, beside a greedy neighbour: what they need is kept between them."""
    rows = [keeper.register(terms("a")), keeper.register(terms("b"))]
    for row in rows:
        appear(row, os.getpid())
    rows[1].set(EngineWord.DEMAND_BYTES, BUDGET)
    clock.tick(100, *rows)
    before = rows[0].lease.revision
    for number in range(60):
        rows[0].set(EngineWord.DEMAND_BYTES, FLOOR + (30 + number % 10) * UNIT)
        clock.tick(4, *rows)
        rows[0].set(EngineWord.DEMAND_BYTES, FLOOR)
        clock.tick(16, *rows)
    assert rows[0].lease.revision - before <= 2


def test_a_raised_guarantee_is_taken_from_the_neighbour(keeper: LeaseKeeper, clock: Clock) -> None:
    """An engine that asks for its new guarantee gets it, though its neighbour wants everything."""
    rows = [keeper.register(terms("a")), keeper.register(terms("b"))]
    for row in rows:
        appear(row, os.getpid())
    rows[1].set(EngineWord.DEMAND_BYTES, BUDGET)
    clock.tick(10, *rows)
    keeper.set_limits("a", 300 * UNIT, BUDGET)
    rows[0].set(EngineWord.DEMAND_BYTES, 300 * UNIT)
    clock.tick(10, *rows)
    assert [row.lease.limit_bytes for row in rows] == [300 * UNIT, BUDGET - 300 * UNIT]
