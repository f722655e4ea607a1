"""One stream of the cluster's state for all who watch it: collected once, encoded once, however many viewers there are.

    read_status, read_decisions --every half second, while anybody watches--> one event --> every viewer

A viewer that is slow misses events and gets the newest. A stream ends by itself after a while and the viewer asks
again, so that an API process that is to end waits for none.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from cluster.api_errors import error_answer
from cluster.cluster_status import ControllerAwayError
from cluster.recent_slo import RecentSlo

PERIOD_S = 0.5
STREAM_S = 10.0
"""Less than an API process that is to end waits for its requests (``cluster.app.DRAIN_S``)."""
VIEWERS_MOST = 256
logger = logging.getLogger(__name__)

_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class LiveFeed:
    """Belongs to the event loop that serves its viewers.

    Args:
        read_status: what ``/ellm/status`` answers; read_decisions: the last ones, the newest first. Both raise
            ControllerAwayError.
        period_s: between two collections; stream_s: a stream's life.
    """

    def __init__(
        self,
        read_status: Callable[[], Awaitable[dict[str, Any]]],
        read_decisions: Callable[[], Awaitable[list[dict[str, Any]]]],
        period_s: float = PERIOD_S,
        stream_s: float = STREAM_S,
    ) -> None:
        self._read_status, self._read_decisions = read_status, read_decisions
        self._period_s, self._stream_s = period_s, stream_s
        self._recent = RecentSlo()
        self._news = asyncio.Condition()
        self._event, self._number = b"", 0
        self._viewers = 0
        self._work: asyncio.Task[None] | None = None

    @property
    def viewers(self) -> int:
        return self._viewers

    def route(self) -> Route:
        """GET /ellm/live: server-sent events; 503 where too many watch already."""
        return Route("/ellm/live", self._answer)

    async def events(self) -> AsyncIterator[bytes]:
        """Encoded server-sent events, until the stream's life is over: ``state`` with an object of ``status``,
        ``recent`` (see RecentSlo) and ``decisions``, or ``away`` with the ``reason``."""
        self._viewers += 1
        if self._work is None:
            self._work = asyncio.ensure_future(self._collect())
        seen, ends_s = self._number, time.monotonic() + self._stream_s
        try:
            while (left_s := ends_s - time.monotonic()) > 0:
                try:
                    async with self._news:
                        await asyncio.wait_for(self._news.wait_for(lambda: self._number > seen), left_s)  # noqa: B023
                except TimeoutError:
                    return
                seen = self._number
                yield self._event
        finally:
            self._viewers -= 1

    async def close(self) -> None:
        """End the collection."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.wait([self._work])

    async def _answer(self, request: Request) -> Response:
        if self._viewers >= VIEWERS_MOST:
            what = f"{VIEWERS_MOST} watch already; close a page, or use `ellm status`"
            return error_answer(what, HTTPStatus.SERVICE_UNAVAILABLE)
        return StreamingResponse(self.events(), media_type="text/event-stream", headers=_HEADERS)

    async def _collect(self) -> None:
        """While there are viewers. The last one's leaving is seen a period later."""
        try:
            while self._viewers:
                began_s = time.monotonic()
                event = await self._next()
                async with self._news:
                    self._event, self._number = event, self._number + 1
                    self._news.notify_all()
                # After a slow answer too there is a pause.
                await asyncio.sleep(max(self._period_s / 2, began_s + self._period_s - time.monotonic()))
        finally:
            self._work = None

    async def _next(self) -> bytes:
        try:
            status, decisions = await asyncio.gather(self._read_status(), self._read_decisions())
        except ControllerAwayError as error:
            return _encoded("away", {"reason": str(error)})
        except Exception:
            # Those who watch would wait for a collection that has ended.
            logger.exception("the state for the live page was not collected")
            return _encoded("away", {"reason": "the state was not collected, the API's log says why"})
        recent = self._recent.add(status["slo"], time.monotonic())
        return _encoded("state", {"status": status, "recent": recent, "decisions": decisions})


def _encoded(name: str, value: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(value))
