"""The HTTP door: what each request is promised, and how it ended. An ASGI layer in front of vLLM's applications.

    headers --> RequestSlo, in a context variable --> vLLM's application --> ClusterCore --> the model's door
    client <--- what vLLM sends, held back until the request is admitted <---------------------+
           <--- 429 with Retry-After, 504, or an error event instead, where the cluster has ended the request

vLLM begins a stream's response before its first engine request, and so before anybody can know whether there is room
for it. So the beginning of a response is held here until the model's door has admitted the request. To a request that
was ended by the cluster vLLM only finds that its engine aborted it; what it then sends is dropped, and the reason sent
instead. This relies on ASGI, on tasks inheriting context variables, and on vLLM answering an aborted request.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api_errors import error_answer
from cluster.auth_layer import caller_of
from cluster.config import SloClass
from cluster.key_ring import Caller
from cluster.request_slo import CURRENT, RequestSlo, Stop
from cluster.slo import CLASS_HEADER, TPOT_HEADER, TTFT_HEADER, Ending, SloHeaderError, request_targets
from cluster.slo_ledger import SloLedger

TENANT_HEADER = "x-tenant-id"
SESSION_HEADER = "x-session-id"
"""As Ray Serve names it."""
SESSION_MOST = 256
KEY_HEADER = "idempotency-key"
KEY_MOST = 255
PATHS = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/responses",
        "/v1/messages",
        "/invocations",
    }
)
"""Of requests that engines answer."""
_NAMED_EVENTS = ("/v1/responses", "/v1/messages")
"""Their streams have a name for each event, and no [DONE]."""
_HEADERS = {
    name.encode(): name for name in (CLASS_HEADER, TTFT_HEADER, TPOT_HEADER, TENANT_HEADER, SESSION_HEADER, KEY_HEADER)
}


class ClassForbidden(Exception):
    """The key of a request is not for the class that it names; the message says which classes are."""


class SloLayer:
    """Belongs to the event loop that serves its requests."""

    def __init__(self, classes: Sequence[SloClass], ledger: SloLedger) -> None:
        self._classes, self._ledger = classes, ledger

    async def serve(self, model: str, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request to ``model`` with ``app``. Headers that make no sense are refused with 400."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PATHS:
            await app(scope, receive, send)
            return
        headers, caller = _known(scope["headers"]), caller_of(scope)
        try:
            if caller is not None:
                _apply_key(headers, caller)
            slo_class, slo = request_targets(self._classes, headers)
            session, key = _session(headers), _idempotency_key(headers)
        except SloHeaderError as error:
            await error_answer(str(error), HTTPStatus.BAD_REQUEST)(scope, receive, send)
            return
        except ClassForbidden as error:
            await error_answer(str(error), HTTPStatus.FORBIDDEN)(scope, receive, send)
            return
        tenant = headers.get(TENANT_HEADER, "")
        request = RequestSlo(slo_class, slo, time.monotonic(), tenant, caller is not None, session, key)
        exchange = _Exchange(request, receive, send)
        timer = _start_timer(request)
        token = CURRENT.set(request)
        if caller is not None:
            caller.quota.begins(request)
        try:
            await app(scope, exchange.receive, exchange.send)
            await exchange.finish(scope)
        finally:
            CURRENT.reset(token)
            if caller is not None:
                caller.quota.ends(request, time.monotonic())
            if timer is not None:
                timer.cancel()
            if (ending := exchange.ending()) is not None:
                self._ledger.add(request.outcome(model, ending))


class _Exchange:
    """What passes between a client and the application, and what of it is held back."""

    def __init__(self, request: RequestSlo, receive: Receive, send: Send) -> None:
        self._request, self._receive, self._send = request, receive, send
        self._body: list[bytes] | None = [] if not request.tenant else None
        self._held: list[Message] = []
        self._status = 0
        self._through = False
        """The response has begun: what comes goes on to the client."""
        self._complete = False
        self._left = False
        """The client, before its answer was complete."""

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._left |= not self._complete
        elif self._body is not None:
            self._body.append(message.get("body", b""))
            if not message.get("more_body", False):
                self._request.tenant, self._body = _user_in(b"".join(self._body)), None
        return message

    def send(self, message: Message) -> Awaitable[None]:
        """Not a coroutine of its own, because every token passes here."""
        if self._request.halt is not None:
            return _nothing()
        if self._through:
            self._complete = not message.get("more_body", False)
            return self._send(message)
        self._held.append(message)
        return self._begin() if self._request.admitted else _nothing()

    async def finish(self, scope: Scope) -> None:
        """The application is done: send what is held back, or why the cluster has ended the request."""
        halt = self._request.halt
        if self._left or self._complete:
            return
        if halt is None:
            await self._begin()
        elif self._through:
            await self._send({"type": "http.response.body", "body": _error_event(scope["path"], halt)})
        else:
            answer = error_answer(halt.message, halt.status)
            if halt.retry_after_s is not None:
                answer.headers["retry-after"] = str(halt.retry_after_s)
            await answer(scope, self._receive, self._send)

    def ending(self) -> Ending | None:
        """How the request has ended; None for one that vLLM refused as wrong."""
        request = self._request
        if self._left:
            return Ending.CANCELLED
        if request.halt is not None and not self._complete:
            return request.halt.ending
        if self._status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            return Ending.REJECTED
        if not self._complete or self._status >= 500 or any(part.failed for part in request.parts):
            return Ending.FAILED
        return Ending.ANSWERED if request.parts and self._status < 400 else None

    async def _begin(self) -> None:
        self._through = True
        held, self._held = self._held, []
        for message in held:
            if message["type"] == "http.response.start":
                self._status = message["status"]
            else:
                self._complete = not message.get("more_body", False)
            await self._send(message)


def _start_timer(request: RequestSlo) -> asyncio.TimerHandle | None:
    deadline_ms = request.slo_class.deadline_ms
    if deadline_ms is None:
        return None
    why = f"the request has outlived the deadline of class {request.slo_class.name}, {deadline_ms:g} ms"
    halt = Stop(Ending.TIMED_OUT, HTTPStatus.GATEWAY_TIMEOUT, why)
    return asyncio.get_running_loop().call_later(deadline_ms / 1000, partial(request.stop, halt))


def _known(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    return {_HEADERS[name]: value.decode("latin-1") for name, value in headers if name in _HEADERS}


def _apply_key(headers: dict[str, str], caller: Caller) -> None:
    """Let the key say whose the request is, and of which class where the request does not. Raises ClassForbidden."""
    key = caller.key
    headers[TENANT_HEADER] = key.tenant
    name = headers.get(CLASS_HEADER, key.default_class)
    if name is None:
        return
    if not key.allows_class(name):
        allowed = ", ".join(key.slo_classes or ())
        raise ClassForbidden(f"key {key.id} is not for requests of class {name[:100]!r}, but for {allowed}")
    headers[CLASS_HEADER] = name


def _session(headers: Mapping[str, str]) -> str:
    """Raises SloHeaderError for one that is too long."""
    session = headers.get(SESSION_HEADER, "")
    if len(session) > SESSION_MOST:
        raise SloHeaderError(f"{SESSION_HEADER} has {len(session)} characters; give at most {SESSION_MOST}")
    return session


def _idempotency_key(headers: Mapping[str, str]) -> str:
    """Empty where there is none. Raises SloHeaderError for one that does not fit."""
    key = headers.get(KEY_HEADER)
    if key is None:
        return ""
    if not 0 < len(key) <= KEY_MOST or not key.isprintable():
        raise SloHeaderError(
            f"{KEY_HEADER} has {len(key)} characters; give 1 to {KEY_MOST} printable ones, such as a random UUID"
        )
    return key


class _Head(msgspec.Struct):
    """What of a body is looked at."""

    user: str | None = None


_HEAD = msgspec.json.Decoder(_Head)


def _user_in(body: bytes) -> str:
    """OpenAI's field ``user``; empty where there is none, or where the body is wrong, which vLLM says."""
    try:
        return _HEAD.decode(body).user or ""
    except msgspec.MsgspecError:
        return ""


def _error_event(path: str, halt: Stop) -> bytes:
    """The last event of a stream that the cluster ends, in the form of its API."""
    kind, code = halt.status.phrase, halt.status.value
    if path == "/v1/messages":
        body: dict[str, Any] = {"type": "error", "error": {"type": kind, "message": halt.message}}
    elif path == "/v1/responses":
        body = {"type": "error", "code": str(code), "message": halt.message, "param": None}
    else:
        body = {"error": {"message": halt.message, "type": kind, "param": None, "code": code}}
    data = f"data: {json.dumps(body)}\n\n"
    return (f"event: error\n{data}" if path in _NAMED_EVENTS else f"{data}data: [DONE]\n\n").encode()


async def _nothing() -> None:
    """The message is dropped, or kept."""
