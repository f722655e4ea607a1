"""An engine core without an engine: its answers, its pace, and how it stands in for an engine in EngineHost."""

import asyncio
import time

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from replicas.paced_core import PacedCore

VOCABULARY = range(100, 1100)


def core(tokens_per_s: float = 0.0, most_running: int = 8) -> PacedCore:
    return PacedCore(VOCABULARY, tokens_per_s, most_running, max_model_len=64)


def request(request_id: str, prompt: list[int], tokens: int | None = 5) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=tokens),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


async def answers(paced: PacedCore, ended: int) -> dict[str, list[EngineCoreOutput]]:
    """Outputs by request, until so many requests have ended."""
    seen: dict[str, list[EngineCoreOutput]] = {}
    async with asyncio.timeout(10):
        while sum(outputs[-1].finished for outputs in seen.values()) < ended:
            for output in (await paced.get_output_async()).outputs:
                seen.setdefault(output.request_id, []).append(output)
    return seen


def tokens(outputs: list[EngineCoreOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


async def test_an_answer_has_the_tokens_asked_for_and_is_always_the_same() -> None:
    """One token a step of the vocabulary, an end with its reason, and the same again whatever else runs."""
    alone, together = core(), core()
    await alone.add_request_async(request("a", [1, 2, 3]))
    for number in range(3):
        await together.add_request_async(request(f"other-{number}", [number]))
    await together.add_request_async(request("a", [1, 2, 3]))
    (one,) = (await answers(alone, 1)).values()
    many = await answers(together, 4)
    assert [len(output.new_token_ids) for output in one] == [1] * 5
    assert (one[-1].finish_reason, one[0].prefill_stats is not None) == (FinishReason.LENGTH, True)
    assert set(tokens(one)) <= set(VOCABULARY)
    assert tokens(one) == tokens(many["a"]) != tokens(many["other-0"])


async def test_answers_end_at_the_longest_length() -> None:
    """Without a limit, or with one beyond it, prompt and answer together are as long as the model allows."""
    paced = core()
    await paced.add_request_async(request("a", [1] * 60, tokens=None))
    await paced.add_request_async(request("b", [1] * 60, tokens=500))
    assert {len(tokens(outputs)) for outputs in (await answers(paced, 2)).values()} == {4}


async def test_more_requests_than_run_at_once_wait() -> None:
    """A request beyond the limit gets its first token when another has ended."""
    paced = core(most_running=1)
    for name in "ab":
        await paced.add_request_async(request(name, [1], tokens=2))
    steps = [[o.request_id for o in (await paced.get_output_async()).outputs] for _ in range(4)]
    assert steps == [["a"], ["a"], ["b"], ["b"]]


@pytest.mark.parametrize("most_running", [1, 8])
async def test_an_aborted_request_gets_nothing_more(most_running: int) -> None:
    """Running or waiting, an aborted request is forgotten."""
    paced = core(most_running=most_running)
    for name in "ab":
        await paced.add_request_async(request(name, [1], tokens=3))
    await paced.get_output_async()
    await paced.abort_requests_async(["b", "unknown"])
    assert {o.request_id for _ in range(2) for o in (await paced.get_output_async()).outputs} == {"a"}


async def test_steps_lie_on_multiples_of_the_period() -> None:
    """No token comes before its time on the clock, and a step that nobody took in time is made up for at once."""
    paced, period_s = core(tokens_per_s=50), 0.02
    await paced.add_request_async(request("a", [1], tokens=30))
    first = int(time.monotonic() / period_s) + 1
    for step in range(3):
        await paced.get_output_async()
        assert time.monotonic() >= (first + step) * period_s
    await asyncio.sleep(10 * period_s)
    late_s = time.monotonic()
    for _ in range(8):
        await paced.get_output_async()
    assert (await paced.get_output_async()).outputs
    assert time.monotonic() - late_s < 10 * period_s
