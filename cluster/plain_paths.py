"""Paths that could be read in two ways are refused: an ASGI layer in front of all that decide by a path.

A router's pattern ends in ``$``, which also matches before a last line end: /metrics%0A is routed as /metrics, yet is
another path to whoever compares it. No route here has a control character.
"""

from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.api_errors import error_answer


class PlainPaths:
    """In front of ``app``."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and not scope["path"].isprintable():
            app = error_answer("there is no such path: it has characters that no route has", HTTPStatus.NOT_FOUND)
        await app(scope, receive, send)
