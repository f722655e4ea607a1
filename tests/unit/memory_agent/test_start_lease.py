"""Leases of starts: reclaimed before they are granted, one after the other where not all fit, given back when live."""

import contextlib
import os
import random
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from memory_agent.device_report import sample_engine
from memory_agent.errors import SettingsError
from memory_agent.lease_board import EngineWord, Row, RowState
from memory_agent.lease_keeper import LeaseKeeper
from memory_agent.start_lease import Stake, check_stakes, choose_starts
from tests.unit.memory_agent.board_players import (
    BUDGET,
    FLOOR,
    GUARANTEE,
    ROOM,
    UNIT,
    WEIGHTS,
    Clock,
    Processes,
    appear,
    follow,
    terms,
)

START = 400 * UNIT
HEAVY = 150 * UNIT
"""Weights that can be felt in the budget."""


def held_bytes(keeper: LeaseKeeper) -> int:
    """The most that all engines can hold of the budget now."""
    return sum(tenant.held_bytes for tenant in keeper.tenants)


def greedy(keeper: LeaseKeeper, clock: Clock) -> Row:
    """A live engine that holds the whole budget and wants more."""
    row = keeper.register(terms("greedy"))
    appear(row, os.getpid())
    row.set(EngineWord.DEMAND_BYTES, 2 * BUDGET)
    clock.tick(5, row)
    assert row.get(EngineWord.COMMITTED_BYTES) == BUDGET
    return row


def test_a_start_is_granted_as_a_greedy_neighbour_gives_back(keeper: LeaseKeeper, clock: Clock) -> None:
    """The neighbour is asked at once; the lease holds the start only when the bytes have really come back, and at no
    moment can more be held than the budget."""
    neighbour = greedy(keeper, clock)
    starting = keeper.register(terms("new", start=START))
    assert neighbour.lease.limit_bytes == BUDGET - START
    for held in range(BUDGET, BUDGET - START, -50 * UNIT):
        neighbour.set(EngineWord.COMMITTED_BYTES, held)
        neighbour.set(EngineWord.APPLIED_REVISION, neighbour.lease.revision)
        clock.tick(3)
        assert starting.lease.limit_bytes == BUDGET - held < START
        assert sample_engine(keeper.tenants[1]).waits_to_start
        assert held_bytes(keeper) <= BUDGET
    clock.tick(3, neighbour)
    assert starting.lease.limit_bytes == START
    assert not sample_engine(keeper.tenants[1]).waits_to_start


def test_what_the_start_took_is_lent_again(keeper: LeaseKeeper, clock: Clock) -> None:
    """Once the engine is live it counts as any other: the neighbour gets the bytes back, and the weights stay."""
    neighbour = greedy(keeper, clock)
    started = keeper.register(terms("new", start=START))
    clock.tick(3, neighbour)
    assert (neighbour.lease.limit_bytes, started.lease.limit_bytes) == (BUDGET - START, START)
    appear(started, os.getpid())
    clock.tick(5, neighbour, started)
    assert neighbour.lease.limit_bytes == BUDGET - FLOOR
    report = sample_engine(keeper.tenants[1])
    assert (report.start_bytes, report.weights_bytes, report.waits_to_start) == (0, WEIGHTS, False)


def test_a_start_uses_its_own_guarantee_first(keeper: LeaseKeeper, clock: Clock) -> None:
    """A start that takes no more than the guarantee needs nothing beside it."""
    row = keeper.register(terms("a", guarantee=600 * UNIT, start=START))
    other = keeper.register(terms("b", guarantee=BUDGET - 600 * UNIT))
    clock.tick()
    assert [row.lease.limit_bytes, other.lease.limit_bytes] == [600 * UNIT, BUDGET - 600 * UNIT]


def test_starts_that_do_not_fit_at_once_take_turns(keeper: LeaseKeeper, clock: Clock) -> None:
    """Of three that race, those that registered first go first, whatever their rows; each next one when one before it
    is live. Meanwhile the others have their guarantees."""
    gone = keeper.register(terms("gone"))
    first = keeper.register(terms("z", start=START))
    keeper.unregister("gone")
    second, third = (keeper.register(terms(name, start=START)) for name in ("y", "x"))
    assert second.index == gone.index < first.index
    rows = [first, second, third]
    clock.tick(5)
    assert [row.lease.limit_bytes for row in rows] == [START, START, GUARANTEE]
    appear(second, os.getpid())
    clock.tick(5, second)
    assert third.lease.limit_bytes == START
    assert held_bytes(keeper) <= BUDGET


def test_a_large_start_is_not_passed_over(keeper: LeaseKeeper, clock: Clock) -> None:
    """One that has to wait for another start goes before smaller ones that came later and would fit beside that."""
    rows = [keeper.register(terms(str(at), start=start)) for at, start in enumerate((START, 7 * START // 4, 2 * UNIT))]
    small = keeper.register(terms("small", start=GUARANTEE + UNIT))
    clock.tick(5)
    assert [row.lease.limit_bytes for row in (*rows, small)] == [START, GUARANTEE, GUARANTEE, GUARANTEE]
    appear(rows[0], os.getpid())
    clock.tick(5, rows[0])
    assert rows[1].lease.limit_bytes == 7 * START // 4


def test_a_registrar_that_dies_frees_its_start(keeper: LeaseKeeper, clock: Clock, processes: Processes) -> None:
    """Whether it was granted or waited: its turn, its bytes and its room for weights go to the next."""
    registrars = [processes.start() for _ in range(2)]
    granted, waiting = (
        keeper.register(terms(str(at), one.pid, start=6 * START // 4)) for at, one in enumerate(registrars)
    )
    last = keeper.register(terms("last", start=6 * START // 4))
    clock.tick(3)
    assert [row.lease.limit_bytes for row in (granted, waiting, last)] == [6 * START // 4, GUARANTEE, GUARANTEE]
    for process, row in zip(reversed(registrars), (waiting, granted), strict=True):
        processes.end(process)
        clock.until(lambda row=row: row.state is RowState.FREE)  # type: ignore[misc]
    clock.tick(3)
    assert last.lease.limit_bytes == 6 * START // 4
    assert [tenant.engine_id for tenant in keeper.tenants] == ["last"]


def test_a_restarted_agent_goes_on_with_the_starts(path: Path) -> None:
    """Who was granted keeps it, who waited goes on waiting behind it, and gets its turn from the agent's next life."""
    keeper = LeaseKeeper(path, BUDGET, ROOM)
    granted, waiting = (keeper.register(terms(name, start=6 * START // 4)) for name in ("granted", "waiting"))
    before = granted.lease
    keeper.close()
    again = LeaseKeeper(path, BUDGET)
    granted, waiting = (again.board.row(index) for index in (0, 1))
    clock = Clock(again)
    clock.tick(5)
    assert again.board.weights_bytes == ROOM
    assert (granted.lease, waiting.lease.limit_bytes) == (before, GUARANTEE)
    appear(granted, os.getpid())
    clock.tick(5, granted)
    assert waiting.lease.limit_bytes == 6 * START // 4
    again.close()


def test_clocks_that_jump_change_no_turn(keeper: LeaseKeeper, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock set back by decades between two registrations, and an hour in which the machine slept."""
    now = [4 * 10**18]
    monkeypatch.setattr(time, "time_ns", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0] / 1e9)
    first = keeper.register(terms("first", start=6 * START // 4))
    now[0] = 0
    second = keeper.register(terms("second", start=6 * START // 4))
    clock.tick(3)
    clock.now_s += 3600.0
    clock.tick(3)
    assert [row.lease.limit_bytes for row in (first, second)] == [6 * START // 4, GUARANTEE]
    assert [row.state for row in (first, second)] == [RowState.STARTING, RowState.STARTING]


def test_a_start_that_can_never_fit_is_refused(keeper: LeaseKeeper) -> None:
    """Even with nothing lent, the guarantees of the others stay: the refusal tells the numbers, and the budget that it
    names is enough."""
    keeper.register(terms("a", guarantee=700 * UNIT))
    for start in (START, BUDGET):
        extra, spare = start - GUARANTEE, BUDGET - 800 * UNIT
        least = BUDGET + extra - spare
        with pytest.raises(SettingsError, match=f"takes {start} bytes, {extra} more.* {spare} bytes .* of {least} byt"):
            keeper.register(terms("b", start=start))
        assert [tenant.engine_id for tenant in keeper.tenants] == ["a"]
        keeper.set_budget(least)
        keeper.register(terms("b", start=start))
        with pytest.raises(SettingsError, match="engine b can never start"):
            keeper.set_budget(least - UNIT)
        keeper.unregister("b")
        keeper.set_budget(BUDGET)


def test_a_guarantee_that_would_bar_a_start_has_to_wait(keeper: LeaseKeeper, clock: Clock) -> None:
    """While an engine starts, the guarantee of another is not raised into what the start needs; afterwards it is."""
    row, starting = keeper.register(terms("a")), keeper.register(terms("b", start=START))
    appear(row, os.getpid())
    with pytest.raises(SettingsError, match="engine b can never start"):
        keeper.set_limits("a", BUDGET - START + UNIT, BUDGET)
    appear(starting, os.getpid())
    clock.tick(3, row, starting)
    keeper.set_limits("a", BUDGET - START + UNIT, BUDGET)


def test_weights_stay_charged_until_the_processes_have_exited(path: Path, processes: Processes) -> None:
    """There is room for the weights of one engine. Its successor, registered while a process of it lives on, does not
    start beside it out of nothing: the neighbour gives way for the second weights first."""
    keeper = LeaseKeeper(path, BUDGET, 2 * WEIGHTS)
    clock, engine = Clock(keeper), processes.start()
    neighbour, old = keeper.register(terms("neighbour")), keeper.register(terms("old"))
    appear(neighbour, os.getpid())
    appear(old, engine.pid)
    neighbour.set(EngineWord.DEMAND_BYTES, BUDGET)
    clock.tick(5, neighbour, old)
    kept = old.lease.limit_bytes
    keeper.unregister("old")
    new = keeper.register(terms("new", start=START))
    for _ in range(3):
        clock.tick(1)
        assert new.lease.limit_bytes == 0, "the neighbour has given nothing back"
    clock.tick(5, neighbour)
    assert new.lease.limit_bytes == START
    assert held_bytes(keeper) == BUDGET - WEIGHTS
    assert neighbour.lease.limit_bytes == BUDGET - WEIGHTS - START - kept
    processes.end(engine)
    clock.until(lambda: old.state is RowState.FREE)
    clock.tick(5, neighbour)
    assert held_bytes(keeper) == BUDGET
    keeper.close()


def test_weights_without_room_of_their_own_are_taken_from_the_budget(path: Path) -> None:
    """Where nothing is set aside for them the budget is all that the device has; where they do not fit the refusal
    names what would, and both remedies work."""
    keeper = LeaseKeeper(path, BUDGET)
    row = keeper.register(terms("a", guarantee=BUDGET - 2 * WEIGHTS))
    appear(row, os.getpid())
    row.set(EngineWord.DEMAND_BYTES, BUDGET)
    Clock(keeper).tick(5, row)
    assert row.lease.limit_bytes == BUDGET - WEIGHTS
    refused = terms("b", guarantee=UNIT)
    said = f"need {2 * WEIGHTS} bytes, 0 are set aside.* budget of {BUDGET + UNIT} bytes or more, {UNIT} bytes for wei"
    with pytest.raises(SettingsError, match=said):
        keeper.register(refused)
    keeper.set_budget(BUDGET, UNIT)
    keeper.register(refused)
    keeper.unregister("b")
    keeper.set_budget(BUDGET + UNIT, 0)
    keeper.register(refused)
    keeper.close()


def test_a_start_that_was_granted_goes_on() -> None:
    """Pure: where less is spare than before, one whose processes may be there already is chosen before others."""
    waits = Stake("waits", GUARANTEE, start_bytes=2 * GUARANTEE, registered_ns=1)
    loads = Stake("loads", GUARANTEE, start_bytes=2 * GUARANTEE, held_bytes=2 * GUARANTEE, registered_ns=2)
    assert choose_starts([waits, loads], 4 * GUARANTEE, 0) == {"waits", "loads"}
    assert choose_starts([waits, loads], 4 * GUARANTEE - UNIT, 0) == {"loads"}


def test_no_choice_exceeds_what_is_spare() -> None:
    """Pure: whoever is chosen fits beside all guarantees at once, and the first always is where each fits alone."""
    chance = random.Random(0)
    for _ in range(500):
        budget = chance.randrange(1, 4000 * UNIT)
        stakes = [
            Stake(
                str(number),
                guarantee_bytes=chance.randrange(1, 400 * UNIT),
                weights_bytes=chance.randrange(200 * UNIT),
                start_bytes=chance.choice([0, chance.randrange(1000 * UNIT)]),
                registered_ns=chance.randrange(100),
            )
            for number in range(chance.randrange(1, 6))
        ]
        room = chance.randrange(600 * UNIT)
        chosen = choose_starts(stakes, budget, room)
        units = [-(-max(s.guarantee_bytes, s.start_bytes * (s.engine_id in chosen)) // UNIT) for s in stakes]
        excess = max(0, sum(stake.weights_bytes for stake in stakes) - room)
        try:
            check_stakes(stakes, budget, room)
        except SettingsError:
            continue
        assert sum(units) * UNIT + excess <= budget
        assert min(stakes, key=lambda stake: (stake.start_bytes > 0, stake.registered_ns)).engine_id in chosen


@dataclass
class Engine:
    """One that a random life plays, with what its processes really hold."""

    name: str
    row: Row
    process: subprocess.Popen[bytes]
    start: int
    loading: int = 0
    weights: int = 0
    limit: int = 0

    @property
    def held(self) -> int:
        """Of the device: weights, what loading holds, and memory that the engine counts itself."""
        return self.weights + self.loading + self.row.get(EngineWord.COMMITTED_BYTES)


@pytest.mark.parametrize("seed", range(8))
def test_random_starts_never_take_the_device_beyond_its_bytes(path: Path, processes: Processes, seed: int) -> None:
    """Starts, deaths, slow departures, agent restarts and a lowered budget in any order: weights, loading and KV memory
    together are never more than budget and room, and whoever is left starts in the end."""
    chance = random.Random(seed)
    keeper, clock = LeaseKeeper(path, BUDGET, 2 * HEAVY), None
    engines: list[Engine] = []
    leaving: list[Engine] = []
    started = 0
    for step in range(1200):
        action = chance.random()
        if action < 0.03 and len(engines) < 4:
            process = processes.start()
            start = chance.randint(1, 500 * UNIT)
            asked = terms(f"engine-{step}", process.pid, guarantee=chance.randint(1, 200 * UNIT), start=start)
            asked = replace(asked, weights_bytes=HEAVY)
            with contextlib.suppress(SettingsError):
                engines.append(Engine(asked.engine_id, keeper.register(asked), process, start))
        elif action < 0.05 and engines:
            engine = engines.pop(chance.randrange(len(engines)))
            if chance.random() < 0.5 and engine.row.get(EngineWord.PID):
                keeper.unregister(engine.name)
                leaving.append(engine)
            else:
                processes.end(engine.process)
        elif action < 0.07 and leaving:
            processes.end(leaving.pop().process)
        elif action < 0.09:
            keeper.close()
            keeper = LeaseKeeper(path, 1)
            for engine in (*engines, *leaving):
                engine.row = keeper.board.row(engine.row.index)
        elif action < 0.4:
            clock = clock or Clock(keeper)
            clock.keeper = keeper
            clock.tick()
        elif engines:
            started += live(chance, chance.choice(engines))
        assert sum(engine.held for engine in (*engines, *leaving)) <= BUDGET + 2 * HEAVY
    assert started > 10
    for engine in leaving:
        processes.end(engine.process)
    clock = Clock(keeper)
    for _ in range(60):
        clock.tick(2)
        for engine in engines:
            live(chance, engine)
            if engine.row.get(EngineWord.PID):
                follow(engine.row)
                engine.limit = engine.row.lease.limit_bytes
    assert all(engine.row.state is RowState.LIVE for engine in engines)
    keeper.close()


def live(chance: random.Random, engine: Engine) -> int:
    """One step of an engine's life: wait, load, become live, then grow and shrink by its lease. 1 when it became
    live."""
    row = engine.row
    if not row.get(EngineWord.PID):
        if not engine.loading:
            if row.lease.limit_bytes >= engine.start:
                engine.loading, engine.weights = engine.start, HEAVY
            return 0
        if chance.random() < 0.5:
            return 0
        engine.loading, engine.limit = 0, row.lease.limit_bytes
        row.set(EngineWord.APPLIED_REVISION, row.lease.revision)
        appear(row, engine.process.pid)
        return 1
    choice = chance.randrange(5)
    if choice == 0:
        row.set(EngineWord.DEMAND_BYTES, chance.choice([0, chance.randint(0, BUDGET), 2 * BUDGET]))
    elif choice == 1:
        engine.limit = row.lease.limit_bytes
        row.set(EngineWord.COMMITTED_BYTES, min(row.get(EngineWord.COMMITTED_BYTES), engine.limit))
        row.set(EngineWord.APPLIED_REVISION, row.lease.revision)
    elif choice == 2:
        committed = row.get(EngineWord.COMMITTED_BYTES)
        row.set(EngineWord.COMMITTED_BYTES, max(committed, min(row.get(EngineWord.DEMAND_BYTES), engine.limit)))
    return 0
