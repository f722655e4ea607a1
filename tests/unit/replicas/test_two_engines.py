"""Two engines on one budget, stepped in any order: both survive a race for its last bytes, and it is never exceeded."""

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memory_agent.lease_board import EngineWord
from memory_agent.lease_keeper import LeaseKeeper
from memory_agent.tenant import EngineTerms
from tests.unit.replicas.modelless_engine import (
    BLOCK_BYTES,
    GUARANTEE_BLOCKS,
    LONGEST_TOKENS,
    Clock,
    ModellessEngine,
    modelless_spec,
)

BUDGET_BLOCKS = 2 * GUARANTEE_BLOCKS + 7
TICK_STEPS = 5


class Device:
    """Two engines and the agent's logic; what they hold together is checked after every step."""

    def __init__(self, folder: Path) -> None:
        self.keeper = LeaseKeeper(folder / "board", BUDGET_BLOCKS * BLOCK_BYTES)
        self.clock = Clock()
        self.engines = [self._start(folder, name) for name in ("a", "b")]
        self._steps = 0

    def _start(self, folder: Path, name: str) -> ModellessEngine:
        spec = modelless_spec(folder, ceiling_blocks=BUDGET_BLOCKS)
        terms = EngineTerms(name, "none", spec.kv_guarantee_bytes, spec.kv_ceiling_bytes, 0, os.getpid())
        row = self.keeper.register(terms)
        return ModellessEngine(folder / "board", row.index, self.clock, spec)

    @property
    def held_blocks(self) -> int:
        return sum(engine.held_blocks for engine in self.engines)

    def step(self, *engines: ModellessEngine) -> None:
        """A step of each of these engines, in this order."""
        for engine in engines:
            engine.step()
            engine.check()
            assert self.held_blocks <= BUDGET_BLOCKS
            self._steps += 1
            if self._steps % TICK_STEPS == 0:
                self.keeper.tick(self.clock())

    def run(self, chance: random.Random, steps: int = 6000) -> None:
        """Steps of either engine, at random, until both have finished their requests."""
        for _ in range(steps):
            if not any(engine.scheduler.has_unfinished_requests() for engine in self.engines):
                for engine in self.engines:
                    engine.check_tokens()
                return
            self.step(chance.choice(self.engines))
        raise AssertionError("requests are still unfinished")

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        self.keeper.close()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    device = Device(tmp_path)
    yield device
    device.close()


@pytest.mark.parametrize("seed", range(4))
def test_a_race_for_the_last_bytes_has_no_victim(device: Device, seed: int) -> None:
    """Both ask for more than the whole budget at the same moment: requests wait, all finish, no map is refused."""
    chance = random.Random(seed)
    for engine in device.engines:
        for number in range(8):
            engine.ask(f"r{number}", prompt=chance.randrange(20, 300), tokens=chance.randrange(5, 200))
    device.run(chance)
    for engine in device.engines:
        assert len(engine.finished) == 8
        assert engine.word(EngineWord.MAP_FAILURES) == engine.word(EngineWord.CONSERVATION_FAILURES) == 0


def test_a_silent_engine_keeps_its_bytes_and_goes_on_afterwards(device: Device) -> None:
    """One engine makes no step for ten seconds while the other wants everything: nothing of it is given away. Then it
    goes on, gives back what it owes, and both finish."""
    silent, busy = device.engines
    for number in range(6):
        silent.ask(f"r{number}", prompt=200, tokens=100)
    for _ in range(60):
        device.step(silent, busy)
    kept = silent.held_blocks
    assert kept > GUARANTEE_BLOCKS
    for number in range(6):
        busy.ask(f"r{number}", prompt=200, tokens=100)
    for _ in range(1000):
        device.step(busy)
    assert silent.held_blocks == kept
    assert busy.row.lease.limit_bytes <= (BUDGET_BLOCKS - kept) * BLOCK_BYTES
    device.run(random.Random(0))
    assert len(silent.finished) == len(busy.finished) == 6


def test_the_guarantee_of_an_idle_engine_is_lent_and_comes_back(device: Device) -> None:
    """Beside an idle neighbour an engine holds more than the neighbour's guarantee leaves; the neighbour's longest
    request then waits for the bytes, gets them, and all finish."""
    idle, busy = device.engines
    for _ in range(500):
        device.step(idle, busy)
    for number in range(8):
        busy.ask(f"r{number}", prompt=200, tokens=250)
    most = 0
    for _ in range(150):
        device.step(busy, idle)
        most = max(most, busy.held_blocks)
    assert most > BUDGET_BLOCKS - GUARANTEE_BLOCKS
    idle.ask("long", prompt=LONGEST_TOKENS - 20, tokens=19)
    device.run(random.Random(0))
    assert idle.finished == {"long"}
    assert len(busy.finished) == 8


def test_a_gap_of_an_hour_in_everybodys_clock_ends_nothing(device: Device) -> None:
    """As after a suspended machine: leases, rows and requests go on where they were."""
    for engine in device.engines:
        for number in range(3):
            engine.ask(f"r{number}", prompt=200, tokens=100)
    for _ in range(40):
        device.step(*device.engines)
    device.clock.now_s += 3600.0
    device.keeper.tick(device.clock())
    assert [tenant.engine_id for tenant in device.keeper.tenants] == ["a", "b"]
    assert [tenant.overdue_bytes for tenant in device.keeper.tenants] == [0, 0]
    device.run(random.Random(0))
    assert [len(engine.finished) for engine in device.engines] == [3, 3]
    assert device.keeper.board.dead_engines == 0


def test_a_wall_clock_that_jumps_changes_nothing(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set by decades in every step: nobody is late or dead, nothing is reclaimed, and all requests finish."""
    chance = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: chance.uniform(0.0, 4e9))
    monkeypatch.setattr(time, "time_ns", lambda: chance.randrange(4 * 10**18))
    for engine in device.engines:
        for number in range(3):
            engine.ask(f"r{number}", prompt=200, tokens=100)
    device.run(chance)
    assert [len(engine.finished) for engine in device.engines] == [3, 3]
    assert device.keeper.board.dead_engines == 0
    assert [tenant.overdue_bytes for tenant in device.keeper.tenants] == [0, 0]
