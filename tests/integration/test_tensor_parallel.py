"""A real engine of two ranks with elastic KV memory. float32, greedy; bytes by the operating system."""

import asyncio
from pathlib import Path

import pytest

from memory_agent.lease_board import EngineWord
from replicas.local_engine import LocalEngine, local_engine
from tests.integration.shaken_engine import prompts, settled, swinging
from tests.integration.tiny_models import (
    BLOCK_BYTES,
    CEILING_BLOCKS,
    GUARANTEE_BLOCKS,
    IDS,
    LIMITS_BYTES,
    REST_BLOCKS,
    tiny_llama,
    tiny_spec,
)

TOKENS = 100
SHORTAGE = "tests.integration.memory_shortage.MemoryShortage"


@pytest.mark.slow
def test_two_ranks_breathe_as_one(tmp_path: Path) -> None:
    """Under a swinging lease the tokens are those of plain vLLM with two ranks, and both ranks hold the same bytes,
    which follow the lease. A rank that is refused memory aborts the mapping on both; requests wait, and finish."""
    model = tiny_llama(tmp_path / "llama")

    async def run() -> None:
        async with local_engine(tiny_spec(model, elastic=False, ranks=2), None) as plain:
            reference = await plain.generate_all(prompts(12, IDS), TOKENS, "reference")
        spec = tiny_spec(model, elastic=True, ranks=2, worker_extension_cls=SHORTAGE)
        async with local_engine(spec, tmp_path / "board") as e:
            assert e.rank_bytes_os() == [REST_BLOCKS * BLOCK_BYTES // 2] * 2
            async with swinging(e, LIMITS_BYTES):
                assert await e.generate_all(prompts(12, IDS), TOKENS, "swing") == reference
            assert e.word(EngineWord.PREEMPTIONS) > 0
            assert e.word(EngineWord.DEFLATE_COUNT) > 2
            assert e.word(EngineWord.MAP_FAILURES) == 0
            await both_ranks_obey(e)
            await one_rank_is_refused_memory(e, reference)
            await both_ranks_obey(e)

    asyncio.run(run())


async def both_ranks_obey(e: LocalEngine) -> None:
    """A lease that shrinks to one longest request, and the idle engine at rest."""
    e.set_limit(GUARANTEE_BLOCKS * BLOCK_BYTES)
    for blocks in (GUARANTEE_BLOCKS, REST_BLOCKS):
        assert await settled(e, lambda most=blocks: e.held_bytes_os() <= most * BLOCK_BYTES)  # type: ignore[misc]
        assert e.rank_bytes_os() == [e.word(EngineWord.COMMITTED_BYTES) // 2] * 2


async def one_rank_is_refused_memory(e: LocalEngine, reference: list[list[int]]) -> None:
    """The second rank gets some chunks more, then none: what the first rank has mapped for nothing goes back."""
    await e.llm.collective_rpc("set_memory_shortage", args=(1, 10))
    e.set_limit(CEILING_BLOCKS * BLOCK_BYTES)
    answers = asyncio.create_task(e.generate_all(prompts(12, IDS), TOKENS, "shortage"))
    assert await settled(e, lambda: e.word(EngineWord.MAP_FAILURES) >= 3)
    assert not answers.done()
    assert await settled(e, lambda: e.rank_bytes_os() == [e.word(EngineWord.COMMITTED_BYTES) // 2] * 2)
    assert e.held_bytes_os() < GUARANTEE_BLOCKS * BLOCK_BYTES
    await e.llm.collective_rpc("set_memory_shortage", args=(1, None))
    assert await answers == reference
    assert e.word(EngineWord.INFLATE_BYTES) > 0
