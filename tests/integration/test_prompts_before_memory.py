"""A real engine computes prompts before it has memory to decode them; their KV lies in the host buffer meanwhile."""

import asyncio
import dataclasses
from pathlib import Path

import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams

from memory_agent.lease_board import EngineWord
from replicas.local_engine import LocalEngine, local_engine
from replicas.spec import EngineSpec
from tests.integration.shaken_engine import prompts, settled
from tests.integration.tiny_models import BLOCK_BYTES, CEILING_BLOCKS, GUARANTEE_BLOCKS, IDS, tiny_llama, tiny_spec

pytestmark = pytest.mark.slow

TOKENS = 100
NEVER_MS = 1e9
LIMIT_BYTES = (GUARANTEE_BLOCKS + 10) * BLOCK_BYTES


def hurried(model: Path) -> EngineSpec:
    """First tokens are always late, those after them never."""
    return dataclasses.replace(
        tiny_spec(model, elastic=True),
        host_buffer_bytes=CEILING_BLOCKS * BLOCK_BYTES,
        ttft_slo_ms=1.0,
        tpot_slo_ms=NEVER_MS,
    )


async def first_steps(engine: LocalEngine, name: str) -> tuple[list[list[int]], int]:
    """The tokens of every prompt, and in which step the last of their first tokens came."""
    begun = engine.word(EngineWord.STEPS)

    async def one(number: int, prompt: list[int]) -> tuple[list[int], int]:
        params = SamplingParams(
            temperature=0.0, max_tokens=TOKENS, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        tokens: list[int] = []
        first = 0
        async for output in engine.llm.generate({"prompt_token_ids": prompt}, params, f"{name}-{number}"):
            tokens += output.outputs[0].token_ids
            first = first or engine.word(EngineWord.STEPS) - begun
        return tokens, first

    answers = await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts(12, IDS))))
    return [tokens for tokens, _ in answers], max(first for _, first in answers)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_first_tokens_come_early_and_no_token_changes(asynchronous: bool, tmp_path: Path) -> None:
    """With memory for four of twelve requests, the last first token comes much earlier where the objective for it is
    violated all the time; where it is not, nobody is set aside. The tokens are those of plain vLLM."""
    model = tiny_llama(tmp_path / "llama")
    spec = dataclasses.replace(hurried(model), async_scheduling=asynchronous)

    async def run() -> None:
        async with local_engine(tiny_spec(model, elastic=False), None) as plain:
            wanted = await plain.generate_all(prompts(12, IDS), TOKENS, "reference")
        steps = []
        for name, tried in (("early", spec), ("calm", dataclasses.replace(spec, ttft_slo_ms=NEVER_MS, tpot_slo_ms=1))):
            async with local_engine(tried, tmp_path / f"{name}.board") as engine:
                engine.set_limit(LIMIT_BYTES)
                tokens, last = await first_steps(engine, name)
                assert tokens == wanted
                steps.append(last)
                assert (engine.word(EngineWord.SET_ASIDE) > 2) == (name == "early")
                assert engine.word(EngineWord.SET_ASIDE) <= 12
        assert steps[0] < 0.7 * steps[1], steps

    asyncio.run(run())


def test_requests_that_are_set_aside_can_be_given_up(tmp_path: Path) -> None:
    """Clients that go away while requests are set aside: the other requests get their tokens, and nothing of those
    that were given up stays in the engine."""
    model = tiny_llama(tmp_path / "llama")
    asked = prompts(12, IDS)

    async def run() -> None:
        async with local_engine(tiny_spec(model, elastic=False), None) as plain:
            wanted = await plain.generate_all(asked, TOKENS, "reference")
        async with local_engine(hurried(model), tmp_path / "board") as engine:
            engine.set_limit(LIMIT_BYTES)
            tasks = [asyncio.create_task(engine.generate(p, TOKENS, f"first-{i}")) for i, p in enumerate(asked)]
            assert await settled(engine, lambda: engine.word(EngineWord.SET_ASIDE) > 2)
            for task in tasks[:10]:
                task.cancel()
            assert await asyncio.gather(*tasks[10:]) == wanted[10:]
            left = (EngineWord.RUNNING, EngineWord.WAITING, EngineWord.USED_BYTES)
            assert await settled(engine, lambda: not any(engine.word(word) for word in left))
            assert await engine.generate_all(asked, TOKENS, "again") == wanted

    asyncio.run(run())
