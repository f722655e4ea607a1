"""Engines, without a model but with real memory, that are killed or stopped in the middle of a move."""

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memory_agent.lease_board import LIMIT_UNIT_BYTES, EngineWord, Row
from memory_agent.processes import file_bytes
from tests.integration.kept_device import DEATH_S, KeptDevice, eventually, kept_device

UNIT = LIMIT_UNIT_BYTES
BUDGET = 4096 * UNIT
GUARANTEE = 128 * UNIT

Engine = tuple[Row, subprocess.Popen[str]]


@pytest.fixture
def device(tmp_path: Path) -> Iterator[KeptDevice]:
    with kept_device(tmp_path / "board", BUDGET) as device:
        yield device


@pytest.fixture
def first(device: KeptDevice) -> Engine:
    return device.start_fake("first", GUARANTEE)


@pytest.fixture
def second(device: KeptDevice) -> Engine:
    return device.start_fake("second", GUARANTEE)


def held(engine: Engine) -> int:
    """By the operating system; 0 when its processes are gone."""
    [(pid, fd)] = engine[0].workers
    return file_bytes(pid, fd)


@pytest.mark.parametrize("growing", [True, False])
def test_memory_of_an_engine_killed_in_the_middle_of_a_move_is_back_at_once(
    device: KeptDevice, first: Engine, second: Engine, growing: bool
) -> None:
    """SIGKILL while it inflates, or deflates: within two seconds the operating system has its bytes and the neighbour a
    lease on them, and never more was held than the budget."""
    [worker] = first[0].workers
    device.demand("first", 2 * BUDGET)
    if not growing:
        eventually(lambda: held(first) > 0.8 * BUDGET)
        device.demand("first", 0)
    eventually(lambda: 0.3 * BUDGET < held(first) < 0.6 * BUDGET)
    first[1].kill()
    device.demand("second", 2 * BUDGET)
    eventually(lambda: file_bytes(*worker) == 0 and second[0].lease.limit_bytes == BUDGET, timeout_s=DEATH_S)
    eventually(lambda: held(second) == BUDGET)
    assert device.report("first") is None
    assert device.dead_engines == 1
    assert device.most_held_bytes <= BUDGET


def test_a_stopped_engine_keeps_its_bytes_and_goes_on(device: KeptDevice, first: Engine, second: Engine) -> None:
    """SIGSTOP in the middle of an inflate: the neighbour, which wants everything, gets no byte of it. After SIGCONT it
    gives back what it owes."""
    device.demand("first", 2 * BUDGET)
    eventually(lambda: held(first) > 0.3 * BUDGET)
    first[1].send_signal(signal.SIGSTOP)
    device.demand("second", 2 * BUDGET)
    eventually(lambda: first[0].lease.limit_bytes <= BUDGET // 2)
    kept, may_hold = held(first), first[0].get(EngineWord.COMMITTED_BYTES)
    until_s = time.monotonic() + 1.0
    while time.monotonic() < until_s:
        assert held(first) == kept
        assert second[0].lease.limit_bytes <= BUDGET - may_hold
        time.sleep(0.02)
    first[1].send_signal(signal.SIGCONT)
    eventually(lambda: held(first) == held(second) == BUDGET // 2)
    assert device.most_held_bytes <= BUDGET
    assert device.dead_engines == 0


def test_a_stopped_engine_that_is_killed_gives_its_bytes_up(device: KeptDevice, first: Engine, second: Engine) -> None:
    """Only the exit of its process frees them, and that does at once."""
    device.demand("first", 2 * BUDGET)
    eventually(lambda: held(first) > 0.5 * BUDGET)
    first[1].send_signal(signal.SIGSTOP)
    device.demand("second", 2 * BUDGET)
    eventually(lambda: first[0].lease.limit_bytes <= BUDGET // 2)
    first[1].kill()
    eventually(lambda: second[0].lease.limit_bytes == BUDGET, timeout_s=DEATH_S)
