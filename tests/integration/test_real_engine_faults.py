"""A real vLLM engine that is stopped, and then killed in the middle of a move; a neighbour wants its memory."""

import asyncio
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from cluster.default_model import get_default_model
from memory_agent.lease_board import EngineWord, LeaseBoard, Row, RowState
from memory_agent.tenant import EngineTerms
from replicas.lease_watch import WakePolicy, watch_lease
from replicas.local_engine import LocalEngine, local_engine_at
from replicas.spec import EngineSpec
from tests.integration.kept_device import DEATH_S, KeptDevice, eventually, kept_device

pytestmark = pytest.mark.slow

BLOCK_BYTES = 30 * 2 * 3 * 64 * 2 * 128  # layers x (K, V) x KV heads x head size x bfloat16 x tokens a block
BUDGET_BYTES = 40 * BLOCK_BYTES
GUARANTEE_BYTES = 10 * BLOCK_BYTES


def spec() -> EngineSpec:
    return EngineSpec(
        model_name="smollm2",
        model_path=str(get_default_model(lambda line: None)),
        max_model_len=1024,
        dtype="bfloat16",
        kv_ceiling_bytes=BUDGET_BYTES,
        kv_rest_bytes=2 * BLOCK_BYTES,
        kv_guarantee_bytes=GUARANTEE_BYTES,
        weights_bytes=269 << 20,
        max_num_seqs=16,
        engine_args={"enforce_eager": True},
    )


def burst(requests: int, tokens: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(1000, 40000) for _ in range(tokens)] for _ in range(requests)]


def test_a_stopped_and_then_killed_engine(tmp_path: Path) -> None:
    """Stopped, it keeps every byte, and after SIGCONT every request gets its tokens. Killed in the middle of a move:
    its processes are gone and its bytes are on its neighbour's lease within two seconds; its requests end with an
    error."""
    with kept_device(tmp_path / "board", BUDGET_BYTES) as device:
        asyncio.run(stopped_and_killed(device))
    assert device.most_held_bytes <= BUDGET_BYTES


async def stopped_and_killed(device: KeptDevice) -> None:
    neighbour, _ = device.start_fake("neighbour", GUARANTEE_BYTES)
    terms = EngineTerms("engine", "smollm2", GUARANTEE_BYTES, BUDGET_BYTES, 269 << 20, os.getpid())
    place = device.register(terms)
    row = LeaseBoard.open(place.board_path).row(place.row)
    async with local_engine_at(spec(), place) as engine:
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
    answers = asyncio.ensure_future(engine.generate_all(burst(8, 300), 60, "stopped"))
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
        *(engine.generate(prompt, 60, f"killed-{at}") for at, prompt in enumerate(burst(8, 440))),
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
