"""A small HTTP server that speaks OpenAI's streaming form and answers with controlled delays."""

import asyncio
import json
from types import TracebackType
from typing import Any

from aiohttp import web


class PacedServer:
    """As an async context: serves on a free port of 127.0.0.1.

    Args:
        first_s: from a request to its first chunk. ``slow_every``: each so-manieth request takes three times as long.
        gap_s: between chunks.
        tokens_per_chunk: most tokens in one chunk.
        takes_ids: False refuses prompts of token ids, as servers without that extension do.
        usage: send the token counts in the end.
        key: the API key wanted.
        break_after: end streams after so many chunks, without any sign, as a dying server does.
        error_after: send an error event after so many chunks.
        early_role: a chat's role is announced at once, not with the first token as vLLM does.
        together: answer nothing until so many requests for more than one token are there.
    """

    def __init__(
        self,
        *,
        first_s: float = 0.0,
        gap_s: float = 0.0,
        slow_every: int = 0,
        tokens_per_chunk: int = 1,
        models: tuple[str, ...] = ("toy",),
        takes_ids: bool = True,
        usage: bool = True,
        key: str | None = None,
        break_after: int | None = None,
        error_after: int | None = None,
        early_role: bool = False,
        together: int = 0,
    ) -> None:
        self.first_s, self.gap_s, self.slow_every = first_s, gap_s, slow_every
        self.tokens_per_chunk = tokens_per_chunk
        self.models, self.takes_ids, self.usage, self.key = models, takes_ids, usage, key
        self.break_after, self.error_after = break_after, error_after
        self.bodies: list[dict[str, Any]] = []
        self.early_role = early_role
        self._missing, self._all_there = together, asyncio.Event()

    async def __aenter__(self) -> "PacedServer":
        app = web.Application()
        app.router.add_get("/v1/models", self._list)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        self._runner = web.AppRunner(app, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _list(self, request: web.Request) -> web.Response:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "bad key"}}, status=401)
        return web.json_response({"data": [{"id": name, "root": name} for name in self.models]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        arrived = asyncio.get_running_loop().time()
        body = await request.json()
        chat = "messages" in body
        if not chat and isinstance(body["prompt"], list) and not self.takes_ids:
            return web.json_response({"error": {"message": "prompt should be text"}}, status=400)
        self.bodies.append(body)
        slow = self.slow_every and len(self.bodies) % self.slow_every == 0
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        wanted = body["max_completion_tokens"] if chat else body["max_tokens"]
        role = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
        if chat and self.early_role:
            await self._send(response, role)
        if wanted > 1 and self._missing > 0:
            self._missing -= 1
            if self._missing == 0:
                self._all_there.set()
            await self._all_there.wait()
        due, sent, chunks = arrived + self.first_s * (3 if slow else 1), 0, 0
        while sent < wanted:
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            if chunks == self.break_after:
                await response.write_eof()
                return response
            if chunks == self.error_after:
                await self._send(response, {"error": {"message": "engine died", "code": 500}})
                return response
            if chat and not self.early_role and chunks == 0:
                await self._send(response, role)
            count = min(self.tokens_per_chunk, wanted - sent)
            sent, chunks, due = sent + count, chunks + 1, due + self.gap_s
            text = "héllo " * count
            part = {"delta": {"content": text}} if chat else {"text": text}
            finish = "length" if sent == wanted else None
            await self._send(response, {"choices": [{"index": 0, "finish_reason": finish, **part}]})
        if self.usage:
            tokens = _length(body["messages"][0]["content"] if chat else body["prompt"])
            usage = {"prompt_tokens": tokens, "completion_tokens": sent, "total_tokens": tokens + sent}
            await self._send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _send(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(b": a comment\n\ndata: " + json.dumps(event).encode() + b"\n\n")


def _length(prompt: str | list[Any]) -> int:
    """A token for each id or word; a chat's content can come in parts."""
    if isinstance(prompt, str):
        return len(prompt.split())
    return sum(_length(part["text"]) if isinstance(part, dict) else 1 for part in prompt)
