"""The HTTP API of the cluster: vLLM's own server for each model, behind one small ASGI application.

    /health /metrics /ellm/status     answered here
    /ellm/live                        the state as it changes, for all who watch (``cluster.live_feed``)
    /ellm/decisions                   what the controller decided lately (``cluster.decisions_api``)
    /ui                               the live page (``cluster.page``)
    /ellm/migrate                     a request moved by hand (``cluster.migration_api``)
    /ellm/drain /ellm/drains          replicas and nodes emptied (``cluster.drain_api``)
    /ellm/models                      models added, removed and limited (``cluster.models_api``)
    routes that do not work yet       refused here, in OpenAI's error form
    /v1/models                        all models
    everything else                   vLLM's application of the model that the body names, behind the SLO layer

With one model no body is read here.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api_errors import error_answer, no_such_model
from cluster.api_metrics import MetricsEndpoint
from cluster.api_routes import API_ROUTES, RouteState
from cluster.cluster_status import ControllerAwayError, read_decisions, read_snapshot
from cluster.core_client import ClusterCore
from cluster.decisions_api import decision_routes
from cluster.drain_api import drain_routes
from cluster.drains import drains
from cluster.ingress_peers import IngressPeers
from cluster.live_feed import LiveFeed
from cluster.migration_api import migration_routes
from cluster.model_table import ModelTable, ServedModel
from cluster.models_api import RegistryAwayError, model_routes, read_models
from cluster.page import page_routes
from cluster.scrape_targets import target_routes
from cluster.slo_layer import SloLayer
from cluster.slo_ledger import SloReport, to_json

WAKE_TIMEOUT_S = 120.0
"""A request waits for the first replica of a model so long, at most."""
WAKE_RETRY_S = 15
_DECISIONS_SHOWN = 30
"""On the live page."""
ALL_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def build_api(
    table: ModelTable,
    layer: SloLayer,
    metrics: MetricsEndpoint,
    reports: Callable[[], Awaitable[list[SloReport]]],
    follow: Callable[[], Awaitable[None]],
    peers: IngressPeers,
) -> Starlette:
    """The application for the models of ``table``. Shutting it down ends them.

    Args:
        reports: how requests have fared, by ingress process; follow: keeps the models up to date while it runs.
        peers: the other ingress processes.
    """

    async def health(request: Request) -> Response:
        cores = {model.name: model.engine.engine_core for model in table.routed}
        away = [name for name, core in cores.items() if core.reachable == 0 and not core.rests]
        if table.routed and not away:
            return Response()
        what = f"no replica of {', '.join(away)} is reachable now" if away else "no model is served yet"
        return error_answer(what, HTTPStatus.SERVICE_UNAVAILABLE)

    def cores() -> list[ClusterCore]:
        return [model.engine.engine_core for model in table.routed]

    async def all_models(request: Request) -> Response:
        lists = [await model.app.state.openai_serving_models.show_available_models() for model in table.routed]
        return JSONResponse({"object": "list", "data": [card.model_dump() for cards in lists for card in cards.data]})

    async def collect() -> dict[str, Any]:
        """The controller's snapshot, with the registry's models, how requests have fared, how far this process's
        predictions are off, and which replicas drain. ``models`` is None where the registry is away. Raises
        ControllerAwayError."""
        snapshot = await read_snapshot()
        try:
            models = await read_models()
        except RegistryAwayError:
            models = None
        told = {"models": models, "slo": to_json(await reports()), "predictions": _predictions(table)}
        return snapshot | told | {"drains": [asdict(one) for one in drains(cores())]}

    async def status(request: Request) -> Response:
        """What ``collect`` says; 503 with the reason where the controller is away."""
        try:
            return JSONResponse(await collect())
        except ControllerAwayError as error:
            return error_answer(str(error), HTTPStatus.SERVICE_UNAVAILABLE)

    feed = LiveFeed(collect, lambda: read_decisions(_DECISIONS_SHOWN, ""))

    @asynccontextmanager
    async def lifespan(api: Starlette) -> AsyncIterator[None]:
        following = asyncio.ensure_future(follow())
        try:
            yield
        finally:
            following.cancel()
            await feed.close()
            await table.close()

    routes: list[Route | Mount] = [
        Route("/health", health),
        Route("/metrics", metrics.__call__),
        *target_routes(),
        Route("/ellm/status", status),
        feed.route(),
        *page_routes(),
        *decision_routes(),
        *model_routes(),
        *migration_routes(cores, peers),
        *drain_routes(cores),
        *(_refusal(route.path, route.note) for route in API_ROUTES if route.state is RouteState.NOT_YET),
        Route("/v1/models", all_models),
        Mount("/", ModelSwitch(table, layer)),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


class ModelSwitch:
    """Sends a request to the application of the model that its JSON body names; another name is refused with 404.

    A body that names nothing (none, malformed JSON, no "model") goes to the first application, whose answer is
    vLLM's own error.
    """

    def __init__(self, table: ModelTable, layer: SloLayer) -> None:
        self._table, self._layer = table, layer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        models = self._table.routed
        if not models:
            await error_answer("no model is served yet", HTTPStatus.SERVICE_UNAVAILABLE)(scope, receive, send)
            return
        if len(models) == 1 or scope["type"] != "http" or scope["method"] != "POST":
            await self._serve(models[0], scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        replay = iter(messages)

        async def receive_again() -> Message:
            return next(replay, None) or await receive()

        name = _name_in(body)
        model = self._table.get(name) if name is not None else next(iter(self._table.routed), None)
        if model is None:
            served = [model.name for model in self._table.routed]
            await no_such_model(name or "", served)(scope, receive_again, send)
            return
        await self._serve(model, scope, receive_again, send)

    async def _serve(self, model: ServedModel, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = model.app
        with self._table.request(model):
            if scope["type"] == "http" and scope["method"] == "POST" and model.engine.engine_core.rests:
                app = partial(_serve_awake, model)
            await self._layer.serve(model.name, app, scope, receive, send)


async def _serve_awake(model: ServedModel, scope: Scope, receive: Receive, send: Send) -> None:
    """Serve a request to a model that rests, once it has a replica; else refuse it with 503."""
    app: ASGIApp = model.app
    if not await model.engine.engine_core.wake(WAKE_TIMEOUT_S):
        what = f"{model.name} had no replica, and none has started within {WAKE_TIMEOUT_S:.0f} s; try again later"
        app = error_answer(what, HTTPStatus.SERVICE_UNAVAILABLE)
        app.headers["Retry-After"] = str(WAKE_RETRY_S)
    await app(scope, receive, send)


def _predictions(table: ModelTable) -> dict[str, Any]:
    """How far predictions are off, by model."""
    cores = {model.name: model.engine.engine_core for model in table.routed}
    return {
        name: {"ttft": core.ttft_error.to_json(), "tpot": core.tpot_error.to_json()} for name, core in cores.items()
    }


def _name_in(body: bytes) -> str | None:
    """The model that a body names; None where it names none."""
    try:
        name = json.loads(body)["model"]
    except (ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def _refusal(path: str, note: str) -> Route:
    async def refuse(request: Request) -> Response:
        return error_answer(f"{path} does not work on a cluster yet: {note}", HTTPStatus.NOT_FOUND)

    return Route(path, refuse, methods=ALL_METHODS)
