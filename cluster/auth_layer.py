"""Who may ask for what: an ASGI layer in front of everything, where there are keys.

    /health /ping                   anybody: probes
    GET /ui/...                     anybody: the files of the live page, which asks for a key itself
    /metrics... /load...            scope metrics, or admin
    /ellm /ellm/...                 scope admin
    everything else                 scope inference; a POST counts against the key's quotas

A request shows its key as "Authorization: Bearer KEY", or as x-api-key, which Anthropic's clients send. It is refused
before its body is read, in OpenAI's error form: 401 without a key that counts, 403 for what the key is not for, 429
with Retry-After beyond its quotas. OPTIONS is no exception: no other origins are allowed here, so browsers have no use
for it, and vLLM's metrics answer it.
"""

import re
import time
from collections.abc import Iterable
from http import HTTPStatus

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from cluster.api_errors import error_answer
from cluster.api_key import Scope
from cluster.key_ring import Caller, KeyRing

_OPEN = ("/health", "/ping")
_PAGE = re.compile(r"/ui(/[\w.-]*)?")
_METRICS = ("/metrics", "/load")
_ADMIN = "/ellm"
_CALLER = "ellm.caller"
"""Key of the ASGI scope."""


def caller_of(scope: AsgiScope) -> Caller | None:
    """Who has sent the request; None where there are no keys."""
    caller: Caller | None = scope.get(_CALLER)
    return caller


class AuthLayer:
    """In front of ``app``."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "no route here is a websocket"})
            return
        if scope["type"] == "http" and not _is_open(scope):
            needed = scopes_for(scope["path"])
            caller = self._keys.find(_presented(scope["headers"]))
            if (refusal := _refusal(caller, needed, scope)) is not None:
                await refusal(scope, receive, send)
                return
            scope = {**scope, _CALLER: caller}
        await self._app(scope, receive, send)


def scopes_for(path: str) -> tuple[Scope, ...]:
    """One of these lets a key in. What is new under /ellm is for admins alone."""
    if path == _ADMIN or path.startswith(f"{_ADMIN}/"):
        return (Scope.ADMIN,)
    if path.startswith(_METRICS):  # vLLM answers /metricsanything too
        return Scope.METRICS, Scope.ADMIN
    return (Scope.INFERENCE,)


def _is_open(scope: AsgiScope) -> bool:
    path, method = scope["path"], scope["method"]
    return path in _OPEN or (method in ("GET", "HEAD") and _PAGE.fullmatch(path) is not None)


def _refusal(caller: Caller | None, needed: tuple[Scope, ...], scope: AsgiScope) -> Response | None:
    if caller is None:
        answer = error_answer(
            "no API key that is valid here came with the request; send one as 'Authorization: Bearer KEY'",
            HTTPStatus.UNAUTHORIZED,
        )
        answer.headers["www-authenticate"] = "Bearer"
        return answer
    if not caller.key.may(needed):
        why = f"key {caller.key.id} is for {', '.join(caller.key.scopes)}; this takes {' or '.join(needed)}"
        return error_answer(why, HTTPStatus.FORBIDDEN)
    if scope["method"] != "POST" or Scope.INFERENCE not in needed:
        return None
    if (spent := caller.quota.enter(time.monotonic())) is None:
        return None
    what, wait_s = spent
    bound = caller.key.tokens_per_min if what == "tokens" else caller.key.requests_per_min
    answer = error_answer(
        f"key {caller.key.id} has used its {bound} {what} a minute; come again in {wait_s} s",
        HTTPStatus.TOO_MANY_REQUESTS,
    )
    answer.headers["retry-after"] = str(wait_s)
    return answer


def _presented(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The key of a request; empty where it shows none."""
    found = b""
    for name, value in headers:
        if name == b"authorization":
            kind, _, key = value.strip().partition(b" ")
            return key.strip() if kind.lower() == b"bearer" else b""
        if name == b"x-api-key":
            found = value.strip()
    return found
