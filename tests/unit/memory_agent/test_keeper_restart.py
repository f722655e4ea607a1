"""A restarted agent goes on from the board; engines and restarts in any order."""

import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from memory_agent.lease_board import AgentWord, EngineWord, Row
from memory_agent.lease_keeper import LeaseKeeper
from tests.unit.memory_agent.board_players import BUDGET, ROOM, UNIT, Clock, Processes, appear, terms


def test_restarted_agent_goes_on_from_the_board(path: Path, processes: Processes) -> None:
    """Rows, limits, exposures, budget and counts survive; revisions go on growing; exits in between are noticed."""
    engine = processes.start()
    keeper = LeaseKeeper(path, BUDGET, ROOM)
    live, dying = keeper.register(terms("a")), keeper.register(terms("b"))
    appear(live, os.getpid())
    appear(dying, engine.pid)
    clock = Clock(keeper)
    clock.tick(5, live, dying)
    keeper.set_budget(800 * UNIT)
    lease, exposure = live.lease, live.get(AgentWord.EXPOSURE_BYTES)
    assert exposure > lease.limit_bytes, "lowered, and not acknowledged yet"
    keeper.close()
    processes.end(engine)

    again = LeaseKeeper(path, BUDGET, ROOM)
    row = again.board.row(live.index)
    assert again.board.budget_bytes == 800 * UNIT
    assert (row.lease, row.get(AgentWord.EXPOSURE_BYTES)) == (lease, exposure)
    clock = Clock(again)
    clock.until(lambda: [tenant.engine_id for tenant in again.tenants] == ["a"])
    clock.tick(3, row)
    assert row.lease.limit_bytes == 800 * UNIT
    assert row.lease.revision > lease.revision
    assert again.board.dead_engines == 1
    again.close()


def test_reused_pid_is_not_taken_for_the_engine(path: Path, processes: Processes) -> None:
    """If the engine died while the agent was away and its pid is another's now, the row is freed."""
    engine = processes.start()
    keeper = LeaseKeeper(path, BUDGET, ROOM)
    row = keeper.register(terms("a"))
    appear(row, engine.pid)
    keeper.tick(1.0)
    row.set(AgentWord.ENGINE_START, row.get(AgentWord.ENGINE_START) - 1)
    keeper.close()
    again = LeaseKeeper(path, BUDGET, ROOM)
    again.tick(1.0)
    assert again.tenants == []
    again.close()


@pytest.mark.parametrize("seed", range(6))
def test_random_life_never_overcommits(path: Path, processes: Processes, seed: int) -> None:
    """Engines that act in any order, agent restarts at any point: committed bytes never exceed the budget."""
    chance = random.Random(seed)
    keeper, now_s = LeaseKeeper(path, BUDGET, ROOM), 0.0
    engines: dict[str, subprocess.Popen[bytes]] = {}
    read: dict[str, int] = {}
    deaths = 0
    for step in range(1500):
        rows = {tenant.engine_id: tenant.row for tenant in keeper.tenants if tenant.engine_id in engines}
        action = chance.random()
        if action < 0.01 and len(engines) < 4:
            name = f"engine-{step}"
            engines[name] = processes.start()
            row = keeper.register(
                terms(name, guarantee=chance.randint(1, 250 * UNIT), weight=chance.choice([0.5, 1, 4]))
            )
            appear(row, engines[name].pid)
        elif action < 0.015 and rows:
            name = chance.choice(sorted(rows))
            processes.end(engines.pop(name))
            rows[name].set(EngineWord.COMMITTED_BYTES, 0)
            rows.pop(name)
            deaths += 1
        elif action < 0.02:
            keeper.close()
            keeper = LeaseKeeper(path, 1)
            rows = {tenant.engine_id: tenant.row for tenant in keeper.tenants if tenant.engine_id in engines}
        elif action < 0.35:
            now_s += 0.05
            keeper.tick(now_s)
        elif rows:
            name = chance.choice(sorted(rows))
            act(chance, rows[name], name, read)
        held = sum(row.get(EngineWord.COMMITTED_BYTES) for row in rows.values())
        assert held <= BUDGET
        assert sum(max(row.lease.limit_bytes, row.get(EngineWord.COMMITTED_BYTES)) for row in rows.values()) <= BUDGET
    deadline = time.monotonic() + 5
    while len(keeper.tenants) != len(engines) and time.monotonic() < deadline:
        now_s += 0.05
        keeper.tick(now_s)
    assert keeper.board.dead_engines == deaths > 0
    keeper.close()


def act(chance: random.Random, row: Row, name: str, read: dict[str, int]) -> None:
    """One step of an engine: read, grow, shrink, acknowledge what was read, or change its demand."""
    committed = row.get(EngineWord.COMMITTED_BYTES)
    revision, limit = read.get(name, 0) >> 32, (read.get(name, 0) & 0xFFFFFFFF) * UNIT
    choice = chance.randrange(5)
    if choice == 0:
        read[name] = row.get(AgentWord.LEASE)
    elif choice == 1:
        row.set(EngineWord.COMMITTED_BYTES, max(committed, chance.randint(0, limit)))
    elif choice == 2:
        row.set(EngineWord.COMMITTED_BYTES, chance.randint(0, committed))
    elif choice == 3:
        row.set(EngineWord.APPLIED_REVISION, revision)
    else:
        row.set(EngineWord.DEMAND_BYTES, chance.choice([0, chance.randint(0, BUDGET), 2 * BUDGET]))
