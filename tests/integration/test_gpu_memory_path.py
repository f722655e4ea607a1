"""A real engine over the CUDA backend's memory, which a driver in Python plays: the whole way of a GPU's KV memory but
for the GPU. float32, greedy."""

import asyncio
import dataclasses
from pathlib import Path

import pytest
from vllm.config import VllmConfig

from memory_agent.lease_board import NO_FD, EngineWord
from replicas.local_engine import Instruments, LocalEngine, local_engine
from tests.integration.played_gpu import CHUNK
from tests.integration.shaken_engine import prompts, settled, swinging
from tests.integration.tiny_models import BLOCK_BYTES, CEILING_BLOCKS, IDS, LAYERS, tiny_llama, tiny_spec

pytestmark = pytest.mark.slow

TOKENS = 100
EXTENT_BYTES = LAYERS * CHUNK  # a chunk holds four blocks of a layer
GUARANTEE_BYTES = 10 * EXTENT_BYTES
LIMITS_BYTES = [GUARANTEE_BYTES, 13 * EXTENT_BYTES, 22 * EXTENT_BYTES, CEILING_BLOCKS * BLOCK_BYTES]


def play_gpu(config: VllmConfig) -> None:
    assert config.kv_transfer_config is not None
    config.kv_transfer_config.kv_connector_module_path = "tests.integration.played_gpu"


def test_tokens_and_memory_are_those_of_any_engine(tmp_path: Path) -> None:
    """Under a swinging lease, with chunks that hold several blocks and a host buffer, the tokens are those of plain
    vLLM; an idle engine shrinks to its rest, and what it gave up is loaded when the prompts come again."""
    model = tiny_llama(tmp_path / "llama")
    spec = dataclasses.replace(
        tiny_spec(model, elastic=True),
        kv_guarantee_bytes=GUARANTEE_BYTES,
        host_buffer_bytes=CEILING_BLOCKS * BLOCK_BYTES,
    )

    async def run() -> None:
        async with local_engine(tiny_spec(model, elastic=False), None) as plain:
            wanted = await plain.generate_all(prompts(12, IDS), TOKENS, "reference")
        async with local_engine(spec, tmp_path / "board", instruments=Instruments(prepare=play_gpu)) as e:
            assert e.row is not None and [fd for _, fd in e.row.workers] == [NO_FD]
            async with swinging(e, LIMITS_BYTES):
                assert await e.generate_all(prompts(12, IDS), TOKENS, "swing") == wanted
            assert e.word(EngineWord.PREEMPTIONS) > 0
            assert e.word(EngineWord.DEFLATE_COUNT) > 2
            await the_rest_is_small(e)
            e.set_limit(CEILING_BLOCKS * BLOCK_BYTES)
            loaded = e.word(EngineWord.HOST_LOADED_BLOCKS)
            assert await e.generate_all(prompts(12, IDS), TOKENS, "again") == wanted
            assert e.word(EngineWord.HOST_LOADED_BLOCKS) > loaded
            assert e.word(EngineWord.MAP_FAILURES) == e.word(EngineWord.CONSERVATION_FAILURES) == 0
            assert e.word(EngineWord.HOST_DAMAGED_BLOCKS) == 0

    asyncio.run(run())


async def the_rest_is_small(e: LocalEngine) -> None:
    rest = spec_rest_bytes()
    e.set_limit(rest)
    assert await settled(e, lambda: e.word(EngineWord.COMMITTED_BYTES) <= rest, seconds=10)


def spec_rest_bytes() -> int:
    """The rest in whole extents."""
    return 2 * EXTENT_BYTES
