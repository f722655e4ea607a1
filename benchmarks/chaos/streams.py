"""Clients that stream greedy completions, each answer as token ids."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

PROMPT_TOKENS, ANSWER_TOKENS = (50, 300), (100, 250)
IDS = range(1000, 40000)
SILENT_S = 240.0
"""A stream that says nothing for so long is lost."""
_AGAIN_S = 1.0
_REFUSALS_MOST = 120
_REFUSED = (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE)


@dataclass(frozen=True)
class Prompt:
    """``number``: among all; ``tokens``: of its answer, exactly."""

    number: int
    ids: Sequence[int]
    tokens: int


def made_prompts(count: int, seed: int) -> list[Prompt]:
    """Distinct ones, which follow from ``seed``."""
    rng = random.Random(seed)
    return [
        Prompt(number, rng.choices(IDS, k=rng.randint(*PROMPT_TOKENS)), rng.randint(*ANSWER_TOKENS))
        for number in range(count)
    ]


class LostError(Exception):
    """The stream did not come whole; says how it ended."""


@dataclass(eq=False)
class Stream:
    """One answer on its way; told apart by identity, because several may have the same prompt.

    Attributes:
        longest_pause_s: between two tokens, after the first. last_s: when the last one came, on the monotonic clock.
    """

    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    longest_pause_s: float = 0.0
    last_s: float = float("-inf")

    def take(self, ids: Sequence[int], now_s: float) -> None:
        if self.ids:
            self.longest_pause_s = max(self.longest_pause_s, now_s - self.last_s)
        self.ids.extend(ids)
        self.last_s = now_s


class Clients:
    """So many at a time, each with one stream after the other.

    Args:
        ended: called with each stream that has come whole. lost: with each other, and why.

    Attributes:
        streams: that run now. refused, cut: see ``summary.Found``.
        may_cut: connections may break now, because an ingress was killed: who loses one asks again.
    """

    def __init__(
        self, url: str, model: str, ended: Callable[[Stream], None], lost: Callable[[Stream, str], None]
    ) -> None:
        self._url, self._model, self._ended, self._lost = url, model, ended, lost
        self.streams: set[Stream] = set()
        self.refused = self.cut = 0
        self.may_cut = False

    def in_flight(self, since_s: float) -> int:
        """Streams that have had a token since then, on the monotonic clock, and are not at their end."""
        return sum(one.last_s > since_s for one in self.streams)

    async def run(self, prompts: AsyncIterator[Prompt], clients: int) -> None:
        """Until there are no more prompts; all streams have ended then."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        timeout = httpx.Timeout(20.0, read=SILENT_S)
        async with (
            httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False) as http,
            asyncio.TaskGroup() as all_,
        ):
            for _ in range(clients):
                all_.create_task(self._client(http, prompts))

    async def _client(self, http: httpx.AsyncClient, prompts: AsyncIterator[Prompt]) -> None:
        async for prompt in prompts:
            refusals = 0
            while True:
                stream = Stream(prompt)
                self.streams.add(stream)
                try:
                    refused = await self._stream(http, stream)
                except LostError as error:
                    self._lost(stream, str(error))
                    break
                except httpx.TransportError as error:
                    if not self.may_cut:
                        self._lost(stream, f"{type(error).__name__}: {error}")
                        break
                    self.cut += 1
                    await asyncio.sleep(_AGAIN_S)
                    continue
                finally:
                    self.streams.discard(stream)
                if not refused:
                    self._ended(stream)
                    break
                self.refused += 1
                if (refusals := refusals + 1) == _REFUSALS_MOST:
                    self._lost(stream, f"refused {refusals} times: {refused}")
                    break
                await asyncio.sleep(_AGAIN_S)

    async def _stream(self, http: httpx.AsyncClient, stream: Stream) -> str:
        """Take the answer. Returns why it was refused, empty where it was not. Raises LostError, and what httpx raises
        for a connection that breaks."""
        prompt, done = stream.prompt, False
        body = greedy(self._model, prompt.ids, prompt.tokens) | {"stream": True}
        async with http.stream("POST", f"{self._url}/v1/completions", json=body) as answer:
            if answer.status_code in _REFUSED:
                return (await answer.aread()).decode(errors="replace")[:300] or str(answer.status_code)
            if answer.status_code != httpx.codes.OK:
                text = (await answer.aread()).decode(errors="replace")
                raise LostError(f"status {answer.status_code}: {text[:300]}")
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise LostError(f"error after {len(stream.ids)} tokens: {line[:300]}")
                    for choice in event["choices"]:
                        stream.take(choice["token_ids"] or (), time.monotonic())
        if not done or len(stream.ids) != prompt.tokens:
            raise LostError(
                f"ended after {len(stream.ids)} of {prompt.tokens} tokens, {'with' if done else 'without'} [DONE]"
            )
        return ""


def greedy(model: str, ids: Sequence[int], tokens: int) -> dict[str, Any]:
    """The body of a completion of so many tokens, to be answered with their ids."""
    return {
        "model": model,
        "prompt": list(ids),
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


async def gap_of_best(url: str, model: str, ids: Sequence[int]) -> float | None:
    """Log probability of the best token after ``ids``, less that of the second best; None where the API does not
    say."""
    async with httpx.AsyncClient(timeout=SILENT_S, trust_env=False) as http:
        answer = await http.post(f"{url}/v1/completions", json=greedy(model, ids, 1) | {"logprobs": 2})
    try:
        best = sorted(answer.json()["choices"][0]["logprobs"]["top_logprobs"][0].values(), reverse=True)
        return float(best[0] - best[1])
    except (ValueError, LookupError, TypeError):
        return None
