"""One HTTP connection, and what clients cannot do with it: send a head without end, or slowly, or not read the answer.

    connected, or next request    head              body              answer
    |--- nothing, or keep-alive --|-- head_timeout --|-- body_timeout --|-- write_timeout without room to write --|

uvicorn's protocol class knows none of these bounds; it is replaced as its option ``http`` allows. Connections without
a request are idle: there are at most ``idle_most`` of them, and the one that has been so longest is closed for a new
one, so that idle ones never keep others out.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cluster.config import HttpLimits

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class _HeadTooLarge(Exception):
    """More than max_header_bytes."""


@dataclass
class ConnectionBounds:
    """What the connections of one server share.

    Attributes:
        idle: those without a request, the oldest first.
    """

    limits: HttpLimits
    idle_most: int
    idle: dict["GuardedConnection", None] = field(default_factory=dict)


class GuardedConfig(uvicorn.Config):
    """uvicorn's settings, and ours."""

    def __init__(self, app: Any, bounds: ConnectionBounds, **settings: Any) -> None:
        # No websocket works here, and an upgraded connection would be bounded by nothing.
        super().__init__(app, http=GuardedConnection, ws="none", **settings)
        self.bounds = bounds


class GuardedConnection(HttpToolsProtocol):
    """Belongs to its server's event loop."""

    def __init__(self, config: GuardedConfig, *args: Any, **settings: Any) -> None:
        super().__init__(config, *args, **settings)
        self._bounds, self._limits = config.bounds, config.bounds.limits
        self._in_head = self._in_body = False
        self._head_bytes = self._lines_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._rest()
        self._arm(self._limits.header_timeout_s, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._arm(0, None)
        self.resume_writing()
        self._bounds.idle.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes = self._head_bytes + len(data) if self._in_head else 0
        super().data_received(data)
        if self._in_head and self._head_bytes > self._limits.max_header_bytes:
            self._refuse_head()
        elif self._timer is None and (self._in_head or self._is_idle):
            self._arm(self._limits.header_timeout_s, self.transport.abort)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._lines_bytes = True, 0

    def on_url(self, url: bytes) -> None:
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(name, value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        self._bounds.idle.pop(self, None)
        self._arm(self._limits.body_timeout_s, self._body_is_late)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        self._arm(0, None)
        super().on_message_complete()
        if self._is_idle:  # it was answered before its body had come
            self._rest()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_idle:
            self._rest()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stuck is None:
            self._stuck = self.loop.call_later(self._limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    @property
    def _is_idle(self) -> bool:
        """It has no request, or no more than a part of one's head."""
        return not self._in_body and (self.cycle is None or self.cycle.response_complete)

    def _rest(self) -> None:
        """It has no request now."""
        idle = self._bounds.idle
        idle[self] = None
        if len(idle) > self._bounds.idle_most:
            oldest = next(iter(idle))
            del idle[oldest]
            oldest.transport.abort()

    def _arm(self, timeout_s: float, late: Callable[[], object] | None) -> None:
        """Call ``late`` after so long, in place of what was to be called."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(timeout_s, late) if late is not None else None

    def _body_is_late(self) -> None:
        if self.flow.read_paused:  # it is we who do not read
            self._arm(self._limits.body_timeout_s, self._body_is_late)
        else:
            self.transport.abort()

    def _count(self, *parts: bytes) -> None:
        """Raises what ends the parse, and with it the connection."""
        self._lines_bytes += sum(map(len, parts))
        if self._lines_bytes > self._limits.max_header_bytes:
            raise _HeadTooLarge

    def _refuse_head(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()
