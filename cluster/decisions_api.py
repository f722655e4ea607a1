"""GET /ellm/decisions: what the controller decided lately."""

from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.api_errors import error_answer
from cluster.cluster_status import ControllerAwayError, read_decisions

_MOST = 1000


def decision_routes() -> list[Route]:
    """The route, for the API."""
    return [Route("/ellm/decisions", decisions)]


async def decisions(request: Request) -> Response:
    """The last ones, the newest first: at most ``last`` of them (default 20), about subjects that contain ``subject``.
    400 where ``last`` is no such number; 503 with the reason where the controller is away."""
    text = request.query_params.get("last", "20")
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= _MOST):
        return error_answer(f"last is {text[:20]!r}; give a number from 1 to {_MOST}", HTTPStatus.BAD_REQUEST)
    try:
        found = await read_decisions(int(text), request.query_params.get("subject", ""))
    except ControllerAwayError as error:
        return error_answer(str(error), HTTPStatus.SERVICE_UNAVAILABLE)
    return JSONResponse(found)
