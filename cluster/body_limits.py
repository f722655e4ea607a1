"""What a request's body may be: an ASGI layer that reads it whole and refuses what would cost more than it should.

    more than max_body_bytes                           413
    nested deeper than NESTED_MOST                     400, before a parser recurses into it
    more than CONTAINERS_MOST arrays and objects       400, before a parser makes them
    anything but a JSON object in UTF-8                400
    more than max_sequences prompts x answers          400
    more than BODIES_BYTES of all requests that run    503

Every application here reads a body whole before it does anything, so nothing is lost by reading it before them. They
parse it with Python's json, which takes more than JSON is: UTF-16, byte order marks, NaN, halves of surrogate pairs. Of
a body that is JSON both parsers see the same, the last of keys that are there twice included.
"""

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from pydantic import TypeAdapter, ValidationError
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api_errors import error_answer

NESTED_MOST = 128
CONTAINERS_MOST = 100_000
"""Python takes 0.1 s to make so many, in which nothing else of the process goes on."""
BODIES_BYTES = 256 << 20
"""Bodies that one process has in hand. vLLM keeps a request's body, and what it has parsed, until the answer is
complete: two to three times as much memory as a body of text has bytes, up to forty times for one of empty objects
(measured)."""
_RETRY_S = 5
_EXPECTED = (
    "the body should be a JSON object in UTF-8 (RFC 8259), without a byte order mark, NaN, Infinity, or half of a "
    "surrogate pair"
)
_TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+"?)*+([\[{]|[\]}]|\Z)', re.DOTALL)
_WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})


class BodyLimits:
    """In front of ``app``. Belongs to one event loop."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_sequences: int) -> None:
        """max_sequences: answers of one request, over all of its prompts."""
        self._app, self._most, self._sequences = app, max_body_bytes, max_sequences
        self._held, self._held_most = 0, max(BODIES_BYTES, max_body_bytes)
        """Bytes of bodies that are on their way, or whose requests run."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in _WITH_BODY:
            await self._app(scope, receive, send)
            return
        announced = _announced(dict(scope["headers"]))
        read = self._too_long() if announced > self._most else await self._read(receive)
        if read is None:  # the client has gone
            return
        if isinstance(read, Response):
            await read(scope, receive, send)
            return
        size = len(read)
        try:
            app = _tangled(read) or self._wrong(read) or self._app
            replay = _Replay(read, receive)
            del read  # the application makes a copy of its own
            await app(scope, replay.receive, send)
        finally:
            self._held -= size

    async def _read(self, receive: Receive) -> bytes | Response | None:
        """The body, which counts as held from here on, or what to answer instead; None where the client has gone."""
        pieces: list[bytes] = []
        size, whole = 0, False
        try:
            while not whole:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                piece = message.get("body", b"")
                size += len(piece)
                self._held += len(piece)
                if size > self._most:
                    return self._too_long()
                if self._held > self._held_most:
                    why = (
                        f"the requests of this process have {self._held_most} bytes in their bodies, the most it takes"
                    )
                    return _refused(why, HTTPStatus.SERVICE_UNAVAILABLE)
                pieces.append(piece)
                whole = not message.get("more_body", False)
            return b"".join(pieces)
        finally:
            if not whole:
                self._held -= size

    def _too_long(self) -> Response:
        return _refused(
            f"the body has more than {self._most} bytes, the most that http.limits.max_body_bytes allows",
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        )

    def _wrong(self, body: bytes) -> Response | None:
        """A refusal of what is no JSON object, or asks for too much. No body at all is the application's to judge."""
        if not body:
            return None
        try:
            body.decode()  # msgspec does not look into what it skips
            head = _HEAD.decode(body)
        except ValueError as error:
            return error_answer(f"{_EXPECTED}: {error}", HTTPStatus.BAD_REQUEST)
        if _count(head.n) * _prompts(head) <= self._sequences:
            return None
        return error_answer(
            f"the request asks for more answers (prompts x n) than the {self._sequences} that "
            "http.limits.max_sequences allows",
            HTTPStatus.BAD_REQUEST,
        )


class _Head(msgspec.Struct):
    """What of a body is looked at."""

    n: Any = None
    prompt: Any = None
    prompt_embeds: Any = None
    messages: Any = None


_HEAD = msgspec.json.Decoder(_Head)
_INTEGER = TypeAdapter(int)


def _prompts(head: _Head) -> int:
    """Prompts of a completion, or conversations of a batch of chats: whichever the route has."""
    return max(1, _many(head.prompt) + _many(head.prompt_embeds), _many(head.messages))


def _many(value: Any) -> int:
    """Prompts in ``value``. A list of numbers is one, and so it is to vLLM where some of them are text."""
    if isinstance(value, list) and value and (isinstance(value[0], list) or all(isinstance(one, str) for one in value)):
        return len(value)
    return int(value is not None)


def _count(n: Any) -> int:
    """Answers to each prompt, as the models read it that vLLM validates requests with: "9" and 9.0 are 9."""
    try:
        return max(1, _INTEGER.validate_python(n))
    except ValidationError:  # they take 1 for null, and nothing else that comes here
        return 1


def _tangled(body: bytes) -> Response | None:
    """A refusal of what is nested so deeply that parsers run out of stack, or holds so many arrays and objects that
    everybody else waits for them."""
    if body.count(b"[") + body.count(b"{") <= NESTED_MOST:
        return None
    depth = begun = 0
    for found in _TO_BRACKET.finditer(body):
        if found[1] in (b"[", b"{"):
            depth, begun = depth + 1, begun + 1
            if depth > NESTED_MOST:
                return error_answer(f"the body is nested more than {NESTED_MOST} deep", HTTPStatus.BAD_REQUEST)
            if begun > CONTAINERS_MOST:
                why = f"the body has more than {CONTAINERS_MOST} arrays and objects"
                return error_answer(why, HTTPStatus.BAD_REQUEST)
        else:
            depth -= 1
            if depth < 0:  # no parser goes further
                return None
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
