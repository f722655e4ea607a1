"""A real vLLM engine that is stopped, and then killed in the middle of a move; a neighbour wants its memory."""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from memory_agent.lease_board import EngineWord, LeaseBoard, Row, RowState
from memory_agent.tenant import EngineTerms
from replicas.lease_watch import WakePolicy, watch_lease
from replicas.local_engine import LocalEngine, local_engine_at
from tests.integration.kept_device import DEATH_S, KeptDevice, eventually, kept_device
from tests.integration.small_engine import BUDGET_BYTES, GUARANTEE_BYTES, WEIGHTS_BYTES, burst, small_spec

pytestmark = pytest.mark.slow


def test_a_stopped_and_then_killed_engine(tmp_path: Path) -> None:
    """Stopped, it keeps every byte, and after SIGCONT every request gets its tokens. Killed in the middle of a move:
    its processes are gone and its bytes are on its neighbour's lease within two seconds; its requests end with an
    error."""
    with kept_device(tmp_path / "board", BUDGET_BYTES, WEIGHTS_BYTES) as device:
        asyncio.run(stopped_and_killed(device))
    assert device.most_held_bytes <= BUDGET_BYTES


async def stopped_and_killed(device: KeptDevice) -> None:
    neighbour, _ = device.start_fake("neighbour", GUARANTEE_BYTES)
    terms = EngineTerms("engine", "smollm2", GUARANTEE_BYTES, BUDGET_BYTES, WEIGHTS_BYTES, os.getpid())
    place = device.register(terms)
    row = LeaseBoard.open(place.board_path).row(place.row)
    async with local_engine_at(small_spec(), place) as engine:
        watch = asyncio.create_task(watch_lease(row, engine.wake, WakePolicy()))
        await stopped(device, engine, row, neighbour)
        await killed(device, engine, row, neighbour)
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)


async def until(done: asyncio.Future[Any], engine: LocalEngine, held_bytes: int) -> None:
    """Until the engine holds so much while requests run."""
    while engine.held_bytes_os() < held_bytes:
        assert not done.done(), "the requests ended before the engine held enough"
        await asyncio.sleep(0.005)


async def stopped(device: KeptDevice, engine: LocalEngine, row: Row, neighbour: Row) -> None:
    answers = asyncio.ensure_future(engine.generate_all(burst(1, 8, 300), 60, "stopped"))
    await until(answers, engine, BUDGET_BYTES // 2)
    processes = [engine.core_process(), *engine.core_process().children(recursive=True)]
    for process in processes:
        process.suspend()
    device.demand("neighbour", 2 * BUDGET_BYTES)
    await asyncio.to_thread(eventually, lambda: row.lease.limit_bytes <= BUDGET_BYTES // 2)
    kept, may_hold = engine.held_bytes_os(), engine.word(EngineWord.COMMITTED_BYTES)
    until_s = time.monotonic() + 2.0
    while time.monotonic() < until_s:
        assert engine.held_bytes_os() == kept
        assert neighbour.lease.limit_bytes <= BUDGET_BYTES - may_hold
        await asyncio.sleep(0.05)
    for process in processes:
        process.resume()
    assert [len(answer) for answer in await answers] == [60] * 8
    await asyncio.to_thread(eventually, lambda: neighbour.lease.limit_bytes > BUDGET_BYTES - may_hold)
    device.demand("neighbour", 0)


async def killed(device: KeptDevice, engine: LocalEngine, row: Row, neighbour: Row) -> None:
    processes = [engine.core_process(), *engine.core_process().children(recursive=True)]
    answers = asyncio.gather(
        *(engine.generate(prompt, 60, f"killed-{at}") for at, prompt in enumerate(burst(1, 8, 440))),
        return_exceptions=True,
    )
    await until(answers, engine, BUDGET_BYTES // 4)
    # More is asked for than is mapped: a move is on its way.
    await asyncio.to_thread(eventually, lambda: engine.word(EngineWord.COMMITTED_BYTES) > engine.held_bytes_os())
    os.kill(engine.core_pid, signal.SIGKILL)
    device.demand("neighbour", 2 * BUDGET_BYTES)
    await asyncio.to_thread(
        eventually,
        lambda: row.state is RowState.FREE and neighbour.lease.limit_bytes == BUDGET_BYTES,
        timeout_s=DEATH_S,
    )
    assert not psutil.wait_procs(processes, timeout=DEATH_S)[1]
    assert device.dead_engines == 1
    assert all(isinstance(answer, EngineDeadError) for answer in await answers)
