"""Preempted requests of a real engine come back by loading: one token is computed again. float32, greedy."""

import asyncio
import dataclasses
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path

import pytest

from memory_agent.host_segment import HostSegment, host_segment_path
from memory_agent.lease_board import EngineWord
from replicas.local_engine import local_engine
from replicas.spec import EngineSpec
from tests.integration.resumption_log import VARIABLE, recording, resumptions
from tests.integration.shaken_engine import prompts, swinging
from tests.integration.tiny_models import BLOCK_BYTES, CEILING_BLOCKS, IDS, LIMITS_BYTES, tiny_llama, tiny_spec

TOKENS = 100
PROMPTS = prompts(12, IDS)[1:]
"""Without the first, of whose tokens one is a tie: its logit is the largest by 3e-6, and computing what is before it
again, in other chunks, may turn that."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@cache
def reference(model: Path, ranks: int) -> list[list[int]]:
    """The tokens of plain vLLM."""

    async def run() -> list[list[int]]:
        async with local_engine(tiny_spec(model, elastic=False, ranks=ranks), None) as plain:
            return await plain.generate_all(PROMPTS, TOKENS, "reference")

    return asyncio.run(run())


def buffered(model: Path, asynchronous: bool, ranks: int = 1) -> EngineSpec:
    """A host buffer with room for all that leaves the device."""
    spec = tiny_spec(model, elastic=True, ranks=ranks)
    return dataclasses.replace(spec, host_buffer_bytes=4 * CEILING_BLOCKS * BLOCK_BYTES, async_scheduling=asynchronous)


@pytest.mark.parametrize(("asynchronous", "ranks"), [(False, 1), (True, 1), (False, 2)])
def test_one_token_is_computed_again(
    asynchronous: bool, ranks: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a lease that swings the tokens are those of plain vLLM, every preempted request resumes with all that it
    had, and one that has its prompt behind it computes one token in its first step."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "log"))
    wanted = reference(model, ranks)

    async def run() -> None:
        spec = buffered(model, asynchronous, ranks)
        async with local_engine(spec, tmp_path / "board", instruments=recording()) as e:
            async with swinging(e, LIMITS_BYTES):
                for name in ("first", "second", "third"):
                    assert await e.generate_all(PROMPTS, TOKENS, name) == wanted
            assert e.word(EngineWord.HOST_LOADED_TAILS) > 0

    asyncio.run(run())
    log = resumptions(tmp_path / "log")
    assert len(log) > 10
    assert [one for one in log if one.found != one.had] == []
    decoding = [one for one in log if one.had >= one.prompt]
    assert len(decoding) > 5
    assert {one.computes for one in decoding} == {1}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_damaged_kv_costs_no_token(
    asynchronous: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody writes into the host buffer all the time: what is not whole is computed again, also in steps that are in
    flight when that is found, and the tokens are those of plain vLLM."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "log"))
    wanted = reference(model, 1)

    async def run() -> None:
        spec = buffered(model, asynchronous)
        async with local_engine(spec, tmp_path / "board", instruments=recording()) as e:
            async with swinging(e, LIMITS_BYTES), scribbling(host_segment_path(tmp_path / "board", 0, 0)):
                for name in ("first", "second", "third"):
                    assert await e.generate_all(PROMPTS, TOKENS, name) == wanted
            assert e.word(EngineWord.HOST_DAMAGED_BLOCKS) > 3
            assert e.word(EngineWord.HOST_LOADED_TAILS) > 0

    asyncio.run(run())


@asynccontextmanager
async def scribbling(path: Path) -> AsyncIterator[None]:
    """Twenty times a second some bytes of a block in this segment are overwritten."""
    rng = random.Random(5)

    async def scribble() -> None:
        segment = HostSegment.open(path)
        fd = os.open(path, os.O_RDWR)
        try:
            while True:
                if slots := list(segment.scan().values()):
                    os.pwrite(fd, rng.randbytes(64), segment._slots_at + rng.choice(slots) * segment._stride)
                await asyncio.sleep(0.05)
        finally:
            os.close(fd)
            segment.close()

    task = asyncio.create_task(scribble())
    try:
        yield
    finally:
        task.cancel()
