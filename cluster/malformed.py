"""Bodies over which vLLM's own validators stumble: they expect an object where a client has sent a list, and raise what
FastAPI takes for a fault of the server (500). It is the client's, so it is answered with 400."""

import traceback
from http import HTTPStatus

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from cluster.api_errors import error_answer

_STUMBLES: tuple[type[Exception], ...] = (AttributeError, LookupError, RecursionError)
"""vLLM itself takes ValueError, TypeError and OverflowError for the client's."""
_VALIDATION = "fastapi.dependencies."
"""Module in which FastAPI has a request's body validated, before the route's function is called."""


def answer_malformed(app: FastAPI) -> None:
    """Have ``app`` answer such bodies so. Whatever is raised later on stays a fault of the server."""
    for kind in _STUMBLES:
        app.add_exception_handler(kind, _answer)
    app.middleware_stack = app.build_middleware_stack()  # vLLM has had it built already


async def _answer(request: Request, error: Exception) -> Response:
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    if any(frame.f_globals.get("__name__", "").startswith(_VALIDATION) for frame in frames):
        return error_answer("a field of the body has another type than this route expects", HTTPStatus.BAD_REQUEST)
    raise error
