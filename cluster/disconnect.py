"""Tells vLLM's application that a client is gone, when Ray Serve says so by cancelling.

vLLM's handlers wait for a disconnect message, as a plain ASGI server sends it, and then stop the request in the engine.
Ray Serve cancels the application's task instead, at the same moment or earlier. A handler that is cancelled while it
waits leaves its work behind: the request would run to its end for nobody. So the cancellation is turned into the
message.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATIENCE_S = 5.0
"""How long an application may take to end after its client is gone, before its task is cancelled after all."""


class CancelledAsDisconnect:
    """ASGI middleware: a cancellation becomes ``http.disconnect`` where the application listens for messages, and stays
    a cancellation where it does not, as while it streams."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what the application raises; CancelledError when it was cancelled, after the application ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        gone = asyncio.Event()
        listeners = 0

        async def receive_or_gone() -> Message:
            nonlocal listeners
            listeners += 1
            try:
                return await _first(receive, gone)
            finally:
                listeners -= 1

        async def send_unless_gone(message: Message) -> None:
            if not gone.is_set():
                await send(message)

        work = asyncio.ensure_future(self._app(scope, receive_or_gone, send_unless_gone))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            gone.set()
            if listeners:
                await asyncio.wait([work], timeout=PATIENCE_S)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)  # what it raises has nobody left to read it
            raise


async def _first(receive: Receive, gone: asyncio.Event) -> Message:
    """The next message of the client, or a disconnect as soon as it is gone."""
    tasks = [asyncio.ensure_future(receive()), asyncio.ensure_future(gone.wait())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return {"type": "http.disconnect"} if gone.is_set() else tasks[0].result()  # type: ignore[return-value]
    finally:
        for task in tasks:
            task.cancel()
