"""A completion's events without an engine: as long as vLLM's, a token each, made at no cost."""

import asyncio
import json
from collections.abc import AsyncIterator

MODEL = "bench"
_CHUNK = {
    "id": "cmpl-0123456789abcdef0123456789abcdef",
    "object": "text_completion",
    "created": 1700000000,
    "model": MODEL,
    "choices": [{"index": 0, "text": " token", "logprobs": None, "finish_reason": None, "stop_reason": None}],
}
_LAST = _CHUNK | {"choices": [_CHUNK["choices"][0] | {"finish_reason": "length"}]}  # type: ignore[index]


def _event(value: object) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


TOKEN, LAST_TOKEN, DONE = _event(_CHUNK), _event(_LAST), "data: [DONE]\n\n"


async def stream_events(prompt_tokens: int, tokens: int) -> AsyncIterator[str]:
    """The events of one answer; other streams have their turn after each."""
    for _ in range(tokens - 1):
        yield TOKEN
        await asyncio.sleep(0)
    yield LAST_TOKEN
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}
    yield _event(_CHUNK | {"choices": [], "usage": usage})
    yield DONE
