"""Elastic engines of several kinds answer with the tokens of plain vLLM while their leases swing. float32, greedy."""

import asyncio
from functools import cache
from pathlib import Path

import pytest
from vllm.lora.request import LoRARequest

from memory_agent.agent import Registration
from memory_agent.lease_board import AgentWord, EngineWord, Lease, LeaseBoard, RowState
from replicas.local_engine import LocalEngine, local_engine, local_engine_at
from tests.integration.shaken_engine import prompts, settled, swinging
from tests.integration.tiny_models import (
    BLOCK_BYTES,
    CEILING_BLOCKS,
    GUARANTEE_BLOCKS,
    IDS,
    LIMITS_BYTES,
    tiny_adapter,
    tiny_gemma,
    tiny_llama,
    tiny_spec,
)

TOKENS = 100
LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the checkpoints."""
    folder = tmp_path_factory.mktemp("models")
    tiny_llama(folder / "llama")
    tiny_gemma(folder / "gemma")
    return folder


@cache
def reference(model: Path) -> list[list[int]]:
    """The tokens of plain vLLM."""

    async def run() -> list[list[int]]:
        async with local_engine(tiny_spec(model, elastic=False), None) as plain:
            return await plain.generate_all(prompts(12, IDS), TOKENS, "reference")

    return asyncio.run(run())


def test_a_model_with_sliding_windows(models: Path, tmp_path: Path) -> None:
    """Four KV cache groups share the blocks of one elastic cache."""
    wanted = reference(models / "gemma")

    async def run() -> None:
        async with (
            local_engine(tiny_spec(models / "gemma", elastic=True), tmp_path / "board") as e,
            swinging(e, LIMITS_BYTES),
        ):
            assert e.word(EngineWord.BLOCK_BYTES) == BLOCK_BYTES // 4  # a group is one layer of four
            assert await e.generate_all(prompts(12, IDS), TOKENS, "swing") == wanted
            assert e.word(EngineWord.PREEMPTIONS) > 0
            assert e.word(EngineWord.DEFLATE_COUNT) > 2

    asyncio.run(run())


def test_two_adapters_in_turns(models: Path, tmp_path: Path) -> None:
    """LoRA adapters change the KV cache: requests of two, in one batch, never take each other's blocks."""
    # None without: vLLM's CPU build computes a request of the bare model with an adapter, if one is in its batch.
    adapters = [LoRARequest(f"a{i}", i, str(tiny_adapter(tmp_path / f"a{i}", seed=i))) for i in (1, 2)]
    same = prompts(12, IDS)[:5] * 2  # each prompt with each adapter, so that only the adapter differs

    async def run() -> None:
        async with local_engine(tiny_spec(models / "llama", elastic=False, **LORA), None) as plain:
            wanted = await plain.generate_all(same, TOKENS, "reference", adapters)
        assert len({tuple(tokens) for tokens in wanted}) == len(wanted)
        async with (
            local_engine(tiny_spec(models / "llama", elastic=True, **LORA), tmp_path / "board") as e,
            swinging(e, LIMITS_BYTES),
        ):
            assert await e.generate_all(same, TOKENS, "swing", adapters) == wanted
            assert e.word(EngineWord.PREEMPTIONS) > 0
            assert e.word(EngineWord.DEFLATE_COUNT) > 2

    asyncio.run(run())


def test_two_models_swing_against_each_other(models: Path, tmp_path: Path) -> None:
    """Two models share one budget, which goes back and forth between them: each answers as it does alone, and both
    together never hold more than the budget."""
    wanted = [reference(models / name) for name in ("llama", "gemma")]
    budget = (CEILING_BLOCKS + GUARANTEE_BLOCKS) * BLOCK_BYTES
    board = LeaseBoard.create(tmp_path / "board", budget)
    for number in range(2):
        row = board.row(number)
        row.set(AgentWord.LEASE, Lease(GUARANTEE_BLOCKS * BLOCK_BYTES, 1).pack())
        row.set(AgentWord.STATE, RowState.STARTING)
    specs = [tiny_spec(models / name, elastic=True) for name in ("llama", "gemma")]
    places = [Registration(str(tmp_path / "board"), number) for number in range(2)]

    async def run() -> None:
        async with (
            local_engine_at(specs[0], places[0], engines=2) as first,
            local_engine_at(specs[1], places[1], engines=2) as second,
        ):
            answers = asyncio.gather(
                *(engine.generate_all(prompts(12, IDS), TOKENS, "both") for engine in (first, second))
            )
            turns = await swing_between(first, second, budget, answers)
            assert await answers == wanted
            assert turns > 4
            assert all(e.word(EngineWord.DEFLATE_COUNT) > 2 for e in (first, second))

    asyncio.run(run())


async def swing_between(
    first: LocalEngine, second: LocalEngine, budget: int, until: "asyncio.Future[list[list[list[int]]]]"
) -> int:
    """Give each engine in turn all but the other's guarantee, once the other has let it go; how often."""
    turns = 0
    rich, poor = first, second
    while not until.done():
        poor.set_limit(GUARANTEE_BLOCKS * BLOCK_BYTES)
        assert await settled(poor, lambda: poor.held_bytes_os() <= GUARANTEE_BLOCKS * BLOCK_BYTES)  # noqa: B023
        rich.set_limit(budget - GUARANTEE_BLOCKS * BLOCK_BYTES)
        for _ in range(10):
            assert first.held_bytes_os() + second.held_bytes_os() <= budget
            await asyncio.sleep(0.02)
        rich, poor = poor, rich
        turns += 1
    return turns
