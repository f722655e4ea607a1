"""The agent's logic on a real board with real processes, without Ray: life of a row, leases, restart, reports."""

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memory_agent.agent import AgentSpec, agent_name, board_path
from memory_agent.device_report import DeviceReporter
from memory_agent.errors import SettingsError
from memory_agent.lease_board import LIMIT_UNIT_BYTES, MAX_ROWS, AgentWord, EngineWord, ReplicaWord, Row, RowState
from memory_agent.lease_keeper import LeaseKeeper
from memory_agent.reports import PressureLevel
from memory_agent.tenant import EngineTerms

UNIT = LIMIT_UNIT_BYTES
BUDGET = 1024 * UNIT
GUARANTEE = 100 * UNIT


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


@pytest.fixture
def processes() -> Iterator[Processes]:
    processes = Processes()
    yield processes
    processes.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "device.board"


@pytest.fixture
def keeper(path: Path) -> Iterator[LeaseKeeper]:
    keeper = LeaseKeeper(path, BUDGET)
    yield keeper
    keeper.close()


def terms(
    engine_id: str, registrar_pid: int | None = None, guarantee: int = GUARANTEE, weight: float = 1
) -> EngineTerms:
    return EngineTerms(engine_id, "model", guarantee, BUDGET, 1 << 20, registrar_pid or os.getpid(), weight)


def appear(row: Row, pid: int, workers: tuple[tuple[int, int], ...] = ()) -> None:
    """What an engine does when its processes are up."""
    for index, (worker, fd) in enumerate(workers):
        row.set(EngineWord.WORKER_PID_0 + index, worker)
        row.set(EngineWord.WORKER_FD_0 + index, fd)
    row.set(EngineWord.WORKER_COUNT, len(workers))
    row.set(EngineWord.BLOCK_BYTES, UNIT)
    row.set(EngineWord.BLOCKS_CEILING, BUDGET // UNIT)
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


@pytest.fixture
def clock(keeper: LeaseKeeper) -> Clock:
    return Clock(keeper)


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


def test_dead_engine_gives_its_bytes_back(keeper: LeaseKeeper, clock: Clock, processes: Processes) -> None:
    """The exit of a live engine clears its row, is counted, and its bytes are lent to the others."""
    engine = processes.start()
    dying, other = keeper.register(terms("a")), keeper.register(terms("b"))
    appear(dying, engine.pid)
    appear(other, os.getpid())
    clock.tick(3, dying, other)
    assert other.lease.limit_bytes == BUDGET // 2
    processes.end(engine)
    clock.until(lambda: dying.state is RowState.FREE)
    clock.tick(2, other)
    assert other.lease.limit_bytes == BUDGET
    assert keeper.board.dead_engines == 1
    assert [tenant.engine_id for tenant in keeper.tenants] == ["b"]


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
    assert asking.get(AgentWord.TARGET_BYTES) == BUDGET - GUARANTEE


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
    assert row.lease.limit_bytes == BUDGET - GUARANTEE
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


def test_a_raised_guarantee_is_taken_from_the_neighbour(keeper: LeaseKeeper, clock: Clock) -> None:
    """An engine that asks for nothing gets its new guarantee, though its neighbour wants everything."""
    rows = [keeper.register(terms("a")), keeper.register(terms("b"))]
    for row in rows:
        appear(row, os.getpid())
    rows[1].set(EngineWord.DEMAND_BYTES, BUDGET)
    clock.tick(10, *rows)
    assert rows[0].lease.limit_bytes == GUARANTEE
    keeper.set_limits("a", 300 * UNIT, BUDGET)
    clock.tick(10, *rows)
    assert [row.lease.limit_bytes for row in rows] == [300 * UNIT, BUDGET - 300 * UNIT]


def test_restarted_agent_goes_on_from_the_board(path: Path, processes: Processes) -> None:
    """Rows, limits, exposures, budget and counts survive; revisions go on growing; exits in between are noticed."""
    engine = processes.start()
    keeper = LeaseKeeper(path, BUDGET)
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

    again = LeaseKeeper(path, BUDGET)
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
    keeper = LeaseKeeper(path, BUDGET)
    row = keeper.register(terms("a"))
    appear(row, engine.pid)
    keeper.tick(1.0)
    row.set(AgentWord.ENGINE_START, row.get(AgentWord.ENGINE_START) - 1)
    keeper.close()
    again = LeaseKeeper(path, BUDGET)
    again.tick(1.0)
    assert again.tenants == []
    again.close()


@pytest.mark.parametrize("seed", range(6))
def test_random_life_never_overcommits(path: Path, processes: Processes, seed: int) -> None:
    """Engines that act in any order, agent restarts at any point: committed bytes never exceed the budget."""
    chance = random.Random(seed)
    keeper, now_s = LeaseKeeper(path, BUDGET), 0.0
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
    clock.tick(3)
    reporter = DeviceReporter("node", "cpu", 7, epoch_ns=9)
    first, second = reporter.sample(keeper, 1.0), reporter.sample(keeper, 2.0)
    os.close(fd)
    (engine,) = first.engines
    assert (engine.held_bytes_os, engine.committed_bytes, engine.used_bytes) == (8 * UNIT, 8 * UNIT, 5 * UNIT)
    assert (engine.reachable_blocks, engine.kv_usage) == (20, 0.25), "the lease reaches beyond the ceiling of 20 blocks"
    assert engine.rss_bytes > 1 << 20
    assert (engine.state, engine.target_revision, engine.weights_bytes) == ("LIVE", 4, 1 << 20)
    assert (first.node, first.device, first.agent_pid, first.budget_bytes) == ("node", "cpu", 7, BUDGET)
    assert (first.agent_epoch_ns, first.sequence) < (second.agent_epoch_ns, second.sequence)
    assert pickle.loads(pickle.dumps(first)) == first


def test_agent_whose_own_task_fails_ends_its_process() -> None:
    """An agent that no longer keeps leases exits with 1, so that Ray starts it again, instead of answering calls."""
    code = """
import asyncio
from memory_agent.agent import _die_with
async def fail(): raise RuntimeError("broken on purpose")
async def main():
    task = asyncio.create_task(fail())
    task.add_done_callback(_die_with)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "broken on purpose" in ended.stderr


def test_spec_names_its_board_and_refuses_what_is_no_name() -> None:
    """The board lies in shared memory under the cluster's and the device's name; a path in a name is refused."""
    spec = AgentSpec("c1", "cpu", BUDGET)
    assert board_path(spec) == Path("/dev/shm/ellm-c1-cpu.board")
    assert agent_name("n", "cpu") != agent_name("n", "gpu0")
    for bad in ("../x", "", "a b"):
        with pytest.raises(SettingsError, match="file name"):
            AgentSpec(bad, "cpu", BUDGET)
    with pytest.raises(SettingsError, match="above 0"):
        AgentSpec("c1", "cpu", 0)
