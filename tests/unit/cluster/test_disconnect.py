"""A client that goes away, as Ray Serve tells it: by cancelling the application."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse
from starlette.types import Message
from vllm.entrypoints.serve.utils.api_utils import with_cancellation

from cluster.disconnect import CancelledAsDisconnect


class Handled:
    """An application with vLLM's own decorator, and what happened in it."""

    def __init__(self) -> None:
        self.started, self.stopped = asyncio.Event(), asyncio.Event()
        self.app = FastAPI()
        self.app.post("/whole")(with_cancellation(self._whole))
        self.app.post("/stream")(self._stream)
        self.app.post("/short")(self._short)

    async def _whole(self, raw_request: Request) -> str:
        await self._work()
        return "never"

    async def _stream(self, raw_request: Request) -> StreamingResponse:
        return StreamingResponse(self._tokens())

    async def _short(self, raw_request: Request) -> str:
        return "done"

    async def _tokens(self) -> AsyncIterator[str]:
        try:
            while True:
                yield "token"
                self.started.set()
                await asyncio.sleep(0.01)
        finally:
            self.stopped.set()

    async def _work(self) -> None:
        self.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped.set()


class Client:
    """A client that sends its body and then stays connected without another word."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self._body: list[Message] = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive(self) -> Message:
        if self._body:
            return self._body.pop()
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def send(self, message: Message) -> None:
        self.sent.append(message)


def scope(path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }


@pytest.mark.parametrize("path", ["/whole", "/stream"])
async def test_a_cancelled_application_stops_its_work(path: str) -> None:
    """Whether vLLM's handler waits for a whole answer or streams: its work ends when Ray Serve cancels."""
    handled, client = Handled(), Client()
    task = asyncio.ensure_future(CancelledAsDisconnect(handled.app)(scope(path), client.receive, client.send))
    await asyncio.wait_for(handled.started.wait(), 10)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)
    assert handled.stopped.is_set()
    assert task.cancelled()


async def test_without_it_the_work_would_go_on() -> None:
    """The reason for the middleware: vLLM's decorator leaves its handler running when it is itself cancelled."""
    handled, client = Handled(), Client()
    task = asyncio.ensure_future(handled.app(scope("/whole"), client.receive, client.send))
    await asyncio.wait_for(handled.started.wait(), 10)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)
    assert not handled.stopped.is_set()


async def test_an_answer_passes_unchanged() -> None:
    """Without a cancellation nothing changes."""
    client = Client()
    await CancelledAsDisconnect(Handled().app)(scope("/short"), client.receive, client.send)
    assert [message["type"] for message in client.sent] == ["http.response.start", "http.response.body"]
    assert client.sent[1]["body"] == b'"done"'
