"""What a request's body may be: an ASGI layer that reads it whole and refuses what would cost more than it should.

    more than max_body_bytes                              413
    nested deeper than NESTED_MOST                        400, before a parser recurses into it
    more than max_sequences prompts x answers             400
    more than BODIES_BYTES on their way, of all requests  503

Every application here reads a body whole before it does anything, so nothing is lost by reading it before them.
"""

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api_errors import error_answer

NESTED_MOST = 128
BODIES_BYTES = 1 << 30
_RETRY_S = 5
_TOKENS = re.compile(rb'"(?:[^"\\]+|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)
_WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})


class BodyLimits:
    """In front of ``app``. Belongs to one event loop."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_sequences: int) -> None:
        """max_sequences: answers of one request, over all of its prompts."""
        self._app, self._most, self._sequences = app, max_body_bytes, max_sequences
        self._held = 0
        """Bytes of bodies that are not complete."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in _WITH_BODY:
            await self._app(scope, receive, send)
            return
        announced = _announced(dict(scope["headers"]))
        read = self._too_long() if announced > self._most else await self._read(receive)
        if read is None:  # the client has gone
            return
        if isinstance(read, bytes):
            read = _nested(read) or self._too_many(read) or read
        if isinstance(read, Response):
            await read(scope, receive, send)
            return
        await self._app(scope, _Replay(read, receive).receive, send)

    async def _read(self, receive: Receive) -> bytes | Response | None:
        """The body, or what to answer instead; None where the client has gone."""
        pieces: list[bytes] = []
        size = 0
        try:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                piece = message.get("body", b"")
                size += len(piece)
                self._held += len(piece)
                if size > self._most:
                    return self._too_long()
                if self._held > BODIES_BYTES:
                    return _refused("too much is being sent to this cluster now", HTTPStatus.SERVICE_UNAVAILABLE)
                pieces.append(piece)
                if not message.get("more_body", False):
                    return b"".join(pieces)
        finally:
            self._held -= size

    def _too_long(self) -> Response:
        return _refused(
            f"the body has more than {self._most} bytes, the most that http.limits.max_body_bytes allows",
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        )

    def _too_many(self, body: bytes) -> Response | None:
        try:
            head = _HEAD.decode(body)
        except msgspec.MsgspecError:  # the application says what is wrong
            return None
        wanted = _count(head.n, head.best_of) * _prompts(head)
        if wanted <= self._sequences:
            return None
        return error_answer(
            f"the request asks for {wanted} answers (prompts x n); http.limits.max_sequences allows {self._sequences}",
            HTTPStatus.BAD_REQUEST,
        )


class _Head(msgspec.Struct):
    """What of a body is looked at."""

    n: Any = None
    best_of: Any = None
    prompt: Any = None
    messages: Any = None


_HEAD = msgspec.json.Decoder(_Head)


def _prompts(head: _Head) -> int:
    """Prompts of a completion, or conversations of a batch of chats. A list of numbers is one prompt."""
    for many in (head.prompt, head.messages):
        if isinstance(many, list) and many and isinstance(many[0], str | list):
            return len(many)
    return 1


def _count(*values: Any) -> int:
    return max([1, *(value for value in values if isinstance(value, int))])


def _nested(body: bytes) -> Response | None:
    """A refusal of what is nested so deeply that parsers run out of stack."""
    if body.count(b"[") + body.count(b"{") <= NESTED_MOST:
        return None
    depth = 0
    for found in _TOKENS.finditer(body):
        sign = found[0]
        if sign in (b"[", b"{"):
            depth += 1
            if depth > NESTED_MOST:
                return error_answer(f"the body is nested more than {NESTED_MOST} deep", HTTPStatus.BAD_REQUEST)
        elif sign in (b"]", b"}"):
            depth -= 1
    return None


def _announced(headers: Mapping[bytes, bytes]) -> int:
    """The body's bytes, as its head says; 0 where it does not."""
    text = headers.get(b"content-length", b"")
    return int(text) if text.isdigit() else 0


def _refused(message: str, status: HTTPStatus) -> Response:
    """A refusal of a body that has not been read to its end: what is left of it is not waited for."""
    answer = error_answer(message, status)
    answer.headers["connection"] = "close"
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        answer.headers["retry-after"] = str(_RETRY_S)
    return answer


class _Replay:
    """A body that was read, once more; then whatever else comes."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def receive(self) -> Message:
        body, self._body = self._body, None
        return {"type": "http.request", "body": body} if body is not None else await self._receive()
