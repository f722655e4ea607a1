"""A real vLLM engine on a real GPU with elastic memory: exact tokens, and the device has its memory back. Greedy."""

import asyncio
import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="an engine needs vLLM's GPU build")

from vllm.platforms import current_platform

from memory_agent.lease_board import EngineWord
from replicas.local_engine import local_engine
from replicas.spec import EngineSpec
from tests.integration.shaken_engine import prompts, settled, swinging
from tests.integration.tiny_models import IDS, tiny_llama, tiny_spec

MIB = 1 << 20
EXTENT_BYTES = 16 * MIB  # 256 blocks of 64 KiB
KV_CEILING_BYTES, GUARANTEE_BYTES = 256 * MIB, 2 * EXTENT_BYTES
KV_LIMITS_BYTES = [GUARANTEE_BYTES, 3 * EXTENT_BYTES, 5 * EXTENT_BYTES, KV_CEILING_BYTES]
STEP_BYTES = 128 * MIB
"""More than a step of the tiny model takes: torch asks for segments of 2 and 20 MiB, in whole chunks."""
PROMPTS, TOKENS = 60, 400
LEAK_BYTES = 64 * MIB

pytestmark = pytest.mark.skipif(not current_platform.is_cuda(), reason="the installed vLLM is not its GPU build")


@pytest.fixture(autouse=True)
def one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both engines lay their KV cache out in the same way, so that they differ in nothing but where it lies."""
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "BLHNC")


def free_bytes() -> int:
    return int(torch.cuda.mem_get_info()[0])


def spec(model: Path, elastic: bool, **changes: object) -> EngineSpec:
    return dataclasses.replace(
        tiny_spec(model, elastic),
        kv_ceiling_bytes=KV_CEILING_BYTES,
        kv_rest_bytes=EXTENT_BYTES,
        kv_guarantee_bytes=GUARANTEE_BYTES,
        **changes,  # type: ignore[arg-type]
    )


async def plain_tokens(model: Path, **changes: object) -> list[list[int]]:
    async with local_engine(spec(model, elastic=False, **changes), None) as engine:
        return await engine.generate_all(prompts(PROMPTS, IDS), TOKENS, "reference")


@pytest.mark.parametrize("eager", [True, False])
def test_tokens_are_those_of_plain_vllm(eager: bool, tmp_path: Path) -> None:
    """Under a swinging lease, with and without CUDA graphs, and with a host buffer from which prompts come back; what
    an idle engine gives up is free for others, and after its end all is."""
    model = tiny_llama(tmp_path / "llama")
    args = {"skip_tokenizer_init": True, "block_size": 32, "enforce_eager": eager}
    before = free_bytes()

    async def run() -> None:
        wanted = await plain_tokens(model, engine_args=args)
        elastic = spec(model, elastic=True, engine_args=args, host_buffer_bytes=KV_CEILING_BYTES)
        async with local_engine(elastic, tmp_path / "board") as e:
            async with swinging(e, KV_LIMITS_BYTES):
                assert await e.generate_all(prompts(PROMPTS, IDS), TOKENS, "swing") == wanted
            assert e.word(EngineWord.PREEMPTIONS) > 0 and e.word(EngineWord.DEFLATE_COUNT) > 2
            e.set_limit(KV_CEILING_BYTES)
            assert await e.generate_all(prompts(PROMPTS, IDS), TOKENS, "all") == wanted
            full, held = free_bytes(), e.word(EngineWord.COMMITTED_BYTES)
            e.set_limit(EXTENT_BYTES)
            assert await settled(e, lambda: e.word(EngineWord.COMMITTED_BYTES) <= EXTENT_BYTES)
            assert free_bytes() - full >= held - EXTENT_BYTES
            e.set_limit(KV_CEILING_BYTES)
            loaded = e.word(EngineWord.HOST_LOADED_BLOCKS)
            assert await e.generate_all(prompts(PROMPTS, IDS), TOKENS, "again") == wanted
            assert e.word(EngineWord.HOST_LOADED_BLOCKS) > loaded
            assert e.word(EngineWord.MAP_FAILURES) == e.word(EngineWord.CONSERVATION_FAILURES) == 0

    asyncio.run(run())
    assert before - free_bytes() < LEAK_BYTES


def test_charged_activations_change_no_token_and_come_back(tmp_path: Path) -> None:
    """Steps whose activations are chunks of the lease give the tokens of plain vLLM, and an idle engine keeps none."""
    model = tiny_llama(tmp_path / "llama")

    async def run() -> None:
        wanted = await plain_tokens(model)
        charged = spec(model, elastic=True, charge_activations=True, token_bytes=STEP_BYTES // 256)
        async with local_engine(charged, tmp_path / "board") as e:
            async with swinging(e, [STEP_BYTES + limit for limit in KV_LIMITS_BYTES]):
                assert await e.generate_all(prompts(PROMPTS, IDS), TOKENS, "swing") == wanted
            assert e.word(EngineWord.ACTIVATION_BYTES) > 0
            e.set_limit(STEP_BYTES)
            assert await settled(e, lambda: e.word(EngineWord.COMMITTED_BYTES) <= EXTENT_BYTES)
            assert e.word(EngineWord.ACTIVATION_BYTES) == e.word(EngineWord.CONSERVATION_FAILURES) == 0

    asyncio.run(run())


def test_two_engines_share_a_gpu(tmp_path: Path) -> None:
    """Each starts beside the other and answers as it does alone."""
    model = tiny_llama(tmp_path / "llama")

    async def run() -> None:
        wanted = await plain_tokens(model)
        async with (
            local_engine(spec(model, elastic=True), tmp_path / "one", engines=2) as one,
            local_engine(spec(model, elastic=True), tmp_path / "two", engines=2) as two,
            swinging(one, KV_LIMITS_BYTES),
            swinging(two, KV_LIMITS_BYTES),
        ):
            answers = await asyncio.gather(*(e.generate_all(prompts(PROMPTS, IDS), TOKENS, "both") for e in (one, two)))
            assert answers == [wanted, wanted]

    asyncio.run(run())
