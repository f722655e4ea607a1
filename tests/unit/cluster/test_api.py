"""The application in front of vLLM's: routes, refusals, several models, metrics."""

import collections
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import httpx
import pytest
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry, Counter, Gauge
from starlette.routing import Mount, Route
from vllm.entrypoints.launchers.app import build_app as build_vllm_app

import cluster.api
from cluster.api import build_api
from cluster.api_metrics import CoreCollector, IngressMetrics, MetricsEndpoint
from cluster.api_routes import API_ROUTES, RouteState, routes_table
from cluster.app import ApiModel
from cluster.cluster_status import ControllerAwayError
from cluster.config import SloClass
from cluster.door import Door
from cluster.ingress import vllm_args
from cluster.ingress_peers import IngressPeers
from cluster.metrics_text import text_families
from cluster.model_table import ModelTable, ServedModel
from cluster.models_api import RegistryAwayError
from cluster.prediction import PredictionError
from cluster.slo_layer import SloLayer
from cluster.slo_ledger import SloLedger
from cluster.slo_reports import SloReports
from replicas.spec import EngineSpec
from tests.unit.cluster.vllm_front import no_controller


def spec(name: str) -> EngineSpec:
    return EngineSpec(
        model_name=name,
        model_path="/models/" + name,
        max_model_len=128,
        kv_ceiling_bytes=1,
        kv_rest_bytes=1,
        kv_guarantee_bytes=1,
        weights_bytes=1,
    )


def served(name: str) -> ServedModel:
    """A model whose application says who it is and echoes the body."""
    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(request: Request) -> dict[str, Any]:
        return {"by": name, "body": (await request.body()).decode()}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"by": name}

    async def show_available_models() -> Any:
        return SimpleNamespace(data=[SimpleNamespace(model_dump=lambda: {"id": name})])

    app.state.openai_serving_models = SimpleNamespace(show_available_models=show_available_models)
    error = PredictionError()
    error.observe(2.0, 1.0)
    core = SimpleNamespace(
        reachable=1,
        in_flight=2,
        retried=3,
        continued=0,
        resumption=SimpleNamespace(requests=0, tokens=0),
        replicas=[],
        mover=SimpleNamespace(counts=collections.Counter(), downtimes=0, downtime_s=0.0),
        rests=False,
        door=Door(),
        replica_numbers={0: "r"},
        ttft_error=error,
        tpot_error=PredictionError(),
    )
    engine: Any = SimpleNamespace(engine_core=core, shutdown=lambda: None)

    async def close() -> None:
        pass

    return ServedModel(name, engine, app, CollectorRegistry(), close)


@asynccontextmanager
async def client(*names: str) -> AsyncIterator[tuple[httpx.AsyncClient, ModelTable]]:
    """The API over such models, and their table."""

    async def build(model: ApiModel) -> ServedModel:
        return served(model.spec.model_name)

    async def follow() -> None:
        pass

    table = ModelTable(build)
    table.follow([ApiModel(spec(name), 1, None, None) for name in names])
    await table.until_ready(names)
    ledger = SloLedger()
    layer, reports = SloLayer([SloClass()], ledger), SloReports(ledger, IngressPeers(1))
    api = build_api(
        table,
        layer,
        MetricsEndpoint(IngressMetrics(table, ledger), IngressPeers(1), no_controller),
        reports.read,
        follow,
        IngressPeers(1),
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://api") as http:
        yield http, table
    await table.close()


@pytest.fixture
async def two() -> AsyncIterator[httpx.AsyncClient]:
    async with client("small", "large") as (http, _):
        yield http


def paths(routes: Iterable[Any]) -> set[str]:
    return {route.path for route in routes if isinstance(route, Route | Mount) and route.path}


def test_every_route_of_vllm_is_in_the_table() -> None:
    """No route of vLLM's application is without a word on whether it works here."""
    args = vllm_args(ApiModel(spec("m"), 1, "hermes", None))
    app = build_vllm_app(args, ("generate",), None)
    assert paths(app.routes) - {route.path for route in API_ROUTES} == set()


def test_each_route_is_in_the_table_once() -> None:
    """The table does not contradict itself, and the printed one has a line for each route."""
    listed = [route.path for route in API_ROUTES]
    assert len(listed) == len(set(listed))
    assert len(routes_table().splitlines()) == len(listed) + 2
    page = Path(__file__).parents[3] / "docs" / "api.md"
    assert routes_table() in page.read_text(encoding="utf-8"), "write the table anew: python -m cluster.api_routes"


@pytest.mark.parametrize("route", [route for route in API_ROUTES if route.state is RouteState.NOT_YET])
async def test_what_does_not_work_says_so(two: httpx.AsyncClient, route: Any) -> None:
    """A route that does not work yet answers any method with 404 in OpenAI's error form, and says why."""
    path = route.path.replace("{response_id}", "resp_1")
    for method in ("GET", "POST"):
        answer = await two.request(method, path, json={})
        assert answer.status_code == 404
        assert route.note in answer.json()["error"]["message"]


async def test_the_body_chooses_the_model(two: httpx.AsyncClient) -> None:
    """A request goes to the application of the model that it names, with its body whole."""
    for name in ("large", "small"):
        body = {"model": name, "prompt": "x" * 200_000}
        answer = (await two.post("/v1/completions", json=body)).json()
        assert (answer["by"], json.loads(answer["body"])) == (name, body)


async def test_a_body_in_pieces_arrives_whole(two: httpx.AsyncClient) -> None:
    """A body that is sent in pieces is put together for the choice and passed on unchanged."""

    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b'{"mod', b'el": "la', b'rge"}'):
            yield piece

    answer = (await two.post("/v1/completions", content=pieces())).json()
    assert answer == {"by": "large", "body": '{"model": "large"}'}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"model": 3}', b'{"a": 1}'])
async def test_what_names_no_model_gets_vllms_own_error(two: httpx.AsyncClient, body: bytes) -> None:
    """Bodies that name no model at all go to the first application unchanged: it knows the right error."""
    answer = (await two.post("/v1/completions", content=body)).json()
    assert answer == {"by": "small", "body": body.decode()}


async def test_another_name_is_refused_with_the_served_ones(two: httpx.AsyncClient) -> None:
    """A name that no model has is a 404 in OpenAI's error form that lists the models of the cluster."""
    answer = await two.post("/v1/completions", json={"model": "other"})
    assert answer.status_code == 404
    assert "`other` does not exist. This cluster serves: small, large." in answer.json()["error"]["message"]


async def test_models_are_listed_together(two: httpx.AsyncClient) -> None:
    """/v1/models shows the models of all applications; other GET requests go to the first."""
    assert [card["id"] for card in (await two.get("/v1/models")).json()["data"]] == ["small", "large"]
    assert (await two.get("/version")).json() == {"by": "small"}


async def test_health_names_the_model_without_replicas() -> None:
    """/health is 200 only while each model has a replica."""
    async with client("small", "large") as (api, table):
        assert (await api.get("/health")).status_code == 200
        core: Any = table.routed[1].engine.engine_core
        core.reachable = 0
        answer = await api.get("/health")
    assert answer.status_code == 503
    assert "no replica of large" in answer.json()["error"]["message"]


async def test_a_cluster_without_models_says_so() -> None:
    """Before its first model is served, requests and /health are answered with 503, and no model is listed."""
    async with client() as (api, _):
        answers = [await api.get("/health"), await api.post("/v1/completions", json={"model": "small"})]
        assert (await api.get("/v1/models")).json()["data"] == []
    assert [answer.status_code for answer in answers] == [503, 503]
    assert all("no model is served yet" in answer.json()["error"]["message"] for answer in answers)


async def test_a_model_comes_and_goes_while_requests_run() -> None:
    """Lists and routes follow the table at once; a model that left is not known any more."""
    async with client("small") as (api, table):
        assert (await api.post("/v1/completions", json={"model": "new"})).json()["by"] == "small", "vLLM answers"
        table.follow([ApiModel(spec(name), 1, None, None) for name in ("small", "new", "large")])
        await table.until_ready(["new", "large"])
        assert (await api.post("/v1/completions", json={"model": "new"})).json()["by"] == "new"
        assert [card["id"] for card in (await api.get("/v1/models")).json()["data"]] == ["small", "new", "large"]
        assert 'model_name="new"' in (await api.get("/metrics")).text
        table.follow([ApiModel(spec(name), 1, None, None) for name in ("small", "large")])
        answer = await api.post("/v1/completions", json={"model": "new"})
        assert 'model_name="new"' not in (await api.get("/metrics")).text
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("NotFoundError", "model", 404)


async def test_status_is_the_snapshot_or_a_reason(two: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """/ellm/status is the controller's snapshot; without a controller it is 503 with the reason."""

    async def snapshot() -> dict[str, Any]:
        return {"nodes": []}

    async def away() -> dict[str, Any]:
        raise ControllerAwayError("the cluster's controller is not running")

    async def models() -> list[dict[str, Any]]:
        return [{"name": "small"}]

    async def no_models() -> list[dict[str, Any]]:
        raise RegistryAwayError("the model registry is away")

    monkeypatch.setattr(cluster.api, "read_snapshot", snapshot)
    monkeypatch.setattr(cluster.api, "read_models", models)
    shown = (await two.get("/ellm/status")).json()
    assert (shown["nodes"], shown["models"], shown["slo"]["ingresses"]) == ([], [{"name": "small"}], 1)
    assert shown["predictions"]["small"]["ttft"] == {"count": 1, "median_error": 1.0, "bias": 1.0}
    assert shown["predictions"]["large"]["tpot"]["median_error"] is None
    monkeypatch.setattr(cluster.api, "read_models", no_models)
    assert (await two.get("/ellm/status")).json()["models"] is None
    monkeypatch.setattr(cluster.api, "read_snapshot", away)
    answer = await two.get("/ellm/status")
    assert answer.status_code == 503
    assert "controller is not running" in answer.json()["error"]["message"]


async def test_a_request_waits_for_a_model_that_rests() -> None:
    """A model without a replica is healthy where that is meant to be. A request to it is held until there is one, and
    refused with 503 and a time to come back where none starts; what only asks for something is not held."""
    async with client("small") as (api, table):
        core: Any = table.routed[0].engine.engine_core
        core.rests, core.reachable = True, 0
        woken = [False, True]

        async def wake(timeout_s: float) -> bool:
            assert timeout_s > 0
            return woken.pop(0)

        core.wake = wake
        assert [(await api.get(path)).status_code for path in ("/health", "/version")] == [200, 200]
        refused = await api.post("/v1/completions", json={"model": "small"})
        assert (refused.status_code, int(refused.headers["Retry-After"]) > 0) == (503, True)
        assert "no replica" in refused.json()["error"]["message"]
        assert (await api.post("/v1/completions", json={"model": "small"})).status_code == 200
        assert woken == []


async def test_metrics_name_every_model(two: httpx.AsyncClient) -> None:
    """/metrics is text for Prometheus with our metrics of each model."""
    answer = await two.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    for name in ("small", "large"):
        assert f'ellm_replicas_reachable{{model_name="{name}",ingress="0"}} 1.0' in answer.text
        assert f'ellm_predicted_error_ratio{{model_name="{name}",latency="ttft",ingress="0"}} 1.0' in answer.text
        assert f'ellm_requests_retried_total{{model_name="{name}",ingress="0"}} 3.0' in answer.text
    assert 'latency="tpot",ingress="0"} nan' not in answer.text  # nothing was predicted that can be compared


def test_equal_families_are_merged() -> None:
    """Two models' metrics of one name are one family with the samples of both, as the text format demands."""
    registries = [CollectorRegistry(), CollectorRegistry()]
    for value, registry in enumerate(registries):
        Gauge("running", "Help.", ["model"], registry=registry).labels(f"m{value}").set(value)
        Counter("tokens", "Help.", ["model"], registry=registry).labels(f"m{value}").inc(value + 1)
    families = text_families(chain.from_iterable(registry.collect() for registry in registries))
    assert families["running"][1] == 'running{model="m0"} 0.0\nrunning{model="m1"} 1.0\n'
    assert families["tokens_total"][1] == 'tokens_total{model="m0"} 1.0\ntokens_total{model="m1"} 2.0\n'


def test_our_metrics_start_with_our_name() -> None:
    """Every metric of ours starts with ellm_."""
    table = ModelTable(AsyncMock())
    assert all(metric.name.startswith("ellm_") for metric in CoreCollector(table, SloLedger()).collect())
