"""The HTTP API of the cluster: vLLM's own server for each model, behind one small ASGI application.

    /health /metrics /ellm/status     answered here
    routes that do not work yet       refused here, in OpenAI's error form
    /v1/models                        all models (with one model, vLLM's own answer)
    everything else                   vLLM's application of the model that the body names

With one model no body is read here.
"""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve import create_error_response

from cluster.api_metrics import MetricsEndpoint
from cluster.api_routes import API_ROUTES, RouteState
from cluster.cluster_status import ControllerAwayError, read_snapshot
from cluster.disconnect import CancelledAsDisconnect
from cluster.engine import ClusterEngine

ALL_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


@dataclass(frozen=True)
class ServedModel:
    """One model behind the API: its engine and vLLM's application over it."""

    name: str
    engine: ClusterEngine
    app: FastAPI


def build_api(models: Sequence[ServedModel], metrics: MetricsEndpoint) -> Starlette:
    """The application for all ``models``; shutting it down shuts their engines down."""

    async def health(request: Request) -> Response:
        away = [model.name for model in models if model.engine.engine_core.reachable == 0]
        if not away:
            return Response()
        return _error(f"no replica of {', '.join(away)} is reachable now", HTTPStatus.SERVICE_UNAVAILABLE)

    async def all_models(request: Request) -> Response:
        lists = [await model.app.state.openai_serving_models.show_available_models() for model in models]
        return JSONResponse({"object": "list", "data": [card.model_dump() for cards in lists for card in cards.data]})

    @asynccontextmanager
    async def lifespan(api: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for model in models:
                stack.callback(model.engine.shutdown)
                await stack.enter_async_context(model.app.router.lifespan_context(model.app))
            yield

    routes: list[Route | Mount] = [
        Route("/health", health),
        Route("/metrics", metrics.__call__),
        Route("/ellm/status", status),
        *(_refusal(route.path, route.note) for route in API_ROUTES if route.state is RouteState.NOT_YET),
    ]
    if len(models) > 1:
        routes.append(Route("/v1/models", all_models))
        routes.append(Mount("/", CancelledAsDisconnect(ModelSwitch({model.name: model.app for model in models}))))
    else:
        routes.append(Mount("/", CancelledAsDisconnect(models[0].app)))
    return Starlette(routes=routes, lifespan=lifespan)


async def status(request: Request) -> Response:
    """GET /ellm/status: the controller's snapshot; 503 with the reason where it is away."""
    try:
        return JSONResponse(await read_snapshot())
    except ControllerAwayError as error:
        return _error(str(error), HTTPStatus.SERVICE_UNAVAILABLE)


class ModelSwitch:
    """Sends a request to the application of the model that its JSON body names; another name is refused with 404.

    A body that names nothing (none, malformed JSON, no "model") goes to the first application, whose answer is
    vLLM's own error.
    """

    def __init__(self, apps: dict[str, ASGIApp]) -> None:
        self._apps = apps
        self._first = next(iter(apps.values()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._first(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        replay = iter(messages)

        async def receive_again() -> Message:
            return next(replay, None) or await receive()

        await self._app_for(body)(scope, receive_again, send)

    def _app_for(self, body: bytes) -> ASGIApp:
        try:
            name = json.loads(body)["model"]
        except (ValueError, KeyError, TypeError):
            return self._first
        if not isinstance(name, str):
            return self._first
        if name not in self._apps:
            served = ", ".join(self._apps)
            return _error(f"The model `{name}` does not exist. This cluster serves: {served}.", HTTPStatus.NOT_FOUND)
        return self._apps[name]


def _refusal(path: str, note: str) -> Route:
    async def refuse(request: Request) -> Response:
        return _error(f"{path} does not work on a cluster yet: {note}", HTTPStatus.NOT_FOUND)

    return Route(path, refuse, methods=ALL_METHODS)


def _error(message: str, status_code: HTTPStatus) -> JSONResponse:
    """OpenAI's error form, as vLLM writes it."""
    content: dict[str, Any] = create_error_response(message, status_code.phrase, status_code).model_dump()
    return JSONResponse(content, status_code=status_code)
