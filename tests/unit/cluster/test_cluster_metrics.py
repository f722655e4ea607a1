"""/metrics as a whole: what is exported is what the catalogue says, no more series than it allows, of all processes."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from vllm.usage.usage_lib import UsageContext

import cluster.scrape_targets
from cluster.admission import Verdict
from cluster.api_metrics import IngressMetrics, MetricsEndpoint, cluster_families, stat_logger_in
from cluster.bench.report import Slo
from cluster.cluster_view import ClusterView, ControllerMeasures
from cluster.decision import Decision
from cluster.door import Door
from cluster.ingress_peers import IngressPeers
from cluster.metrics_text import TextFamilies, merged_text, text_families
from cluster.prediction import PredictionError
from cluster.scrape_targets import target_list, target_routes
from cluster.slo import Ending, Outcome
from cluster.slo_ledger import SloLedger
from dashboards.catalogue import GROUPS, SERIES
from memory_agent.lease_board import MAX_ROWS
from replicas.engine_config import build_engine_args
from replicas.spec import EngineSpec
from tests.unit.cluster.conftest import Checkpoint
from tests.unit.cluster.test_controller import BOUNDS, engine, report
from tests.unit.cluster.vllm_front import no_controller

REPLICA_ID = "ellm-model:m#engine#abc{}"
MODEL = "m"


def measures(engines: int = 2) -> ControllerMeasures:
    view = ClusterView(BOUNDS, epoch_ms=1_000)
    view.receive(report(1, *(engine(REPLICA_ID.format(number)) for number in range(engines))), 0.0)
    view.decide(Decision("scale", MODEL, "2 replicas", "because"), 0.0)
    return view.measures(0.5)


def ingress(rank: int = 0, replicas: int = 2) -> IngressMetrics:
    """Of a model that has been asked for something: each of its numbers has a value."""
    error, ledger, door = PredictionError(), SloLedger(), Door()
    error.observe(2.0, 1.0)
    door.verdicts["chat", Verdict.ADMITTED] += 1
    for number in range(replicas):
        replica = REPLICA_ID.format(number)
        ledger.add(Outcome("chat", MODEL, replica, Slo(), Ending.ANSWERED, 0.1, 0.01, 1.0, output_tokens=7))
    core = SimpleNamespace(
        reachable=replicas, in_flight=2, retried=3, continued=1, door=door, ttft_error=error, tpot_error=error,
        resumption=SimpleNamespace(requests=1, tokens=20),
        replicas=[], mover=SimpleNamespace(counts=Counter(), downtimes=0, downtime_s=0.0),
        replica_numbers={number: REPLICA_ID.format(number) for number in range(replicas)},
    )  # fmt: skip
    model = SimpleNamespace(name=MODEL, engine=SimpleNamespace(engine_core=core), metrics=CollectorRegistry())
    table: Any = SimpleNamespace(routed=[model])
    return IngressMetrics(table, ledger, rank)


def of_vllm(checkpoint: Checkpoint, engines: int) -> CollectorRegistry:
    """vLLM's own logger, as an ingress has it for a model of so many replicas."""
    spec = EngineSpec(MODEL, str(checkpoint()), 128, 1 << 20, 1 << 20, 1 << 20, 1, elastic=False)
    registry = CollectorRegistry()
    config = build_engine_args(spec).create_engine_config(UsageContext.OPENAI_API_SERVER)
    stat_logger_in(registry)(config, list(range(engines))).log_engine_initialized()  # type: ignore[no-untyped-call]
    return registry


def parsed(families: TextFamilies) -> list[Metric]:
    return list(text_string_to_metric_families(merged_text([families])))


def series(metrics: Iterable[Metric]) -> dict[str, list[dict[str, str]]]:
    """Labels of every time series, by its name in Prometheus."""
    found: dict[str, list[dict[str, str]]] = {}
    for metric in metrics:
        for sample in metric.samples:
            found.setdefault(sample.name, []).append(dict(sample.labels))
    return found


async def ours() -> list[Metric]:
    text = merged_text([text_families(cluster_families(measures())), await ingress().read()])
    return [metric for metric in text_string_to_metric_families(text) if metric.name.startswith("ellm_")]


async def test_what_is_exported_is_what_the_catalogue_says() -> None:
    """Each metric of ours is in the catalogue and each of the catalogue's is exported, with that type, those labels,
    and of enumerations those values."""
    known = {metric.name: metric for group, metrics in GROUPS.items() if group != "vLLM" for metric in metrics}
    exported = {f"{m.name}_total" if m.type == "counter" else m.name: m for m in await ours()}
    assert exported.keys() == known.keys()
    for name, metric in exported.items():
        assert (metric.type, metric.documentation) == (known[name].kind, known[name].help)
        for sample in metric.samples:
            assert set(sample.labels) - {"le"} == set(SERIES[sample.name])
        for label, values in known[name].values.items():
            assert {sample.labels[label] for sample in metric.samples} == set(values)


def test_vllm_has_the_metrics_that_are_built_upon(checkpoint: Checkpoint) -> None:
    """Names and labels of vLLM's that the catalogue has are there in the supported release, block size and the blocks
    at the ceiling among them."""
    found = series(parsed(text_families(of_vllm(checkpoint, 1).collect(), {"ingress": "0"})))
    for metric in GROUPS["vLLM"]:
        for name in metric.series:
            assert set(SERIES[name]) <= set(found[name][0]), name


async def test_series_are_bounded_by_replicas_and_classes() -> None:
    """A replica more is the same number of series more; a full device stays within it."""

    def count(engines: int) -> int:
        return sum(map(len, series(cluster_families(measures(engines))).values()))

    each = count(2) - count(1)
    assert count(MAX_ROWS) == count(1) + (MAX_ROWS - 1) * each
    assert each <= 70
    here = [sum(map(len, series(parsed(await ingress(replicas=replicas).read())).values())) for replicas in (1, 2, 64)]
    assert here[2] - here[0] == 63 * (here[1] - here[0])


async def test_a_replica_that_has_gone_leaves_no_series() -> None:
    """Series are of what is there: ids of former replicas do not pile up."""
    view = ClusterView(BOUNDS, epoch_ms=1_000)
    for number in range(50):
        view.receive(report(number + 1, engine(REPLICA_ID.format(number))), float(number))
    labels = series(cluster_families(view.measures(49.0)))["ellm_lease_limit_bytes"]
    assert [label["replica"] for label in labels] == ["abc49"]


async def test_all_processes_are_one_answer() -> None:
    """An ingress process answers with the controller's metrics once, and with every process's under its rank; text that
    Prometheus' parser takes, each family once."""
    peers = IngressPeers(2)
    peers.ask = AsyncMock(return_value=[await ingress(rank).read() for rank in (0, 1)])  # type: ignore[method-assign]

    async def known(timeout_s: float) -> ControllerMeasures:
        return measures()

    endpoint = MetricsEndpoint(ingress(), peers, known)
    text = bytes((await endpoint(AsyncMock())).body).decode()
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    found = series(text_string_to_metric_families(text))
    assert [labels["ingress"] for labels in found["ellm_requests_in_flight"]] == ["0", "1"]
    assert {labels["ingress"] for labels in found["process_cpu_seconds_total"]} == {"0", "1"}
    assert len(found["ellm_device_budget_bytes"]) == len(found["ellm_controller_reachable"]) == 1
    assert not [name for name in found if name.endswith("_created")]


async def test_without_a_controller_the_rest_is_there() -> None:
    """The controller is told to be away, and no old number of a device is shown."""
    text = bytes((await MetricsEndpoint(ingress(), IngressPeers(1), no_controller)(AsyncMock())).body).decode()
    assert "\nellm_controller_reachable 0.0\n" in text
    assert "ellm_device" not in text and "ellm_requests_in_flight{" in text


def test_text_keeps_what_labels_hold() -> None:
    """Names with quotes, backslashes and ends of lines come back as they were, beside labels that are added; numbers
    that are no finite ones too."""
    strange = 'a "b"\\ c\nd'
    gauge = GaugeMetricFamily("g", 'Help "me"\\\nnow.', labels=["name"])
    for value in (math.inf, -math.inf, 1e300, 3):
        gauge.add_metric([strange], value)
    (read,) = parsed(text_families([gauge], {"ingress": strange}))
    assert [sample.labels for sample in read.samples] == [{"name": strange, "ingress": strange}] * 4
    assert [sample.value for sample in read.samples] == [math.inf, -math.inf, 1e300, 3]
    assert read.documentation == gauge.documentation


def test_an_absent_device_has_an_age_and_no_numbers() -> None:
    """What a silent agent has said last is not shown as if it were now."""
    view = ClusterView(BOUNDS, epoch_ms=1_000)
    view.receive(report(1, engine()), 0.0)
    found = {metric.name: metric for metric in cluster_families(view.measures(10.0))}
    assert found["ellm_device_report_age_seconds"].samples[0].value == 10.0
    assert found["ellm_device_budget_bytes"].samples == []


def test_a_label_of_the_catalogue_takes_nothing_from_clients() -> None:
    """No metric has a label for what a client may choose."""
    labels = {label for names in SERIES.values() for label in names}
    assert labels.isdisjoint({"tenant", "user", "request_id", "session", "path", "prompt", "key"})


NODES = [
    {"Alive": True, "MetricsExportPort": 8080, "NodeManagerAddress": "10.0.0.2"},
    {"Alive": True, "MetricsExportPort": 8080, "NodeManagerAddress": "10.0.0.1"},
    {"Alive": False, "MetricsExportPort": 8080, "NodeManagerAddress": "10.0.0.3"},
    {"Alive": True, "MetricsExportPort": 0, "NodeManagerAddress": "10.0.0.4"},
]


def test_the_target_list_is_the_api_and_rays_nodes() -> None:
    """One target for the cluster, and the living nodes that tell Ray's own metrics."""
    ours, rays = target_list("gpu:8000", "https", NODES)
    assert ours == {
        "targets": ["gpu:8000"],
        "labels": {"job": "ellm", "__scheme__": "https", "__metrics_path__": "/metrics"},
    }
    assert rays == {"targets": ["10.0.0.1:8080", "10.0.0.2:8080"], "labels": {"job": "ray"}}


@pytest.mark.parametrize("nodes", [NODES, None])
async def test_the_list_names_the_address_it_was_asked_at(monkeypatch: pytest.MonkeyPatch, nodes: Any) -> None:
    """Whoever reaches the list reaches the target; without Ray's control store it is the target alone."""

    def told() -> Any:
        if nodes is None:
            raise ConnectionError
        return nodes

    monkeypatch.setattr(cluster.scrape_targets.ray, "nodes", told)
    transport = httpx.ASGITransport(Starlette(routes=target_routes()))
    async with httpx.AsyncClient(transport=transport, base_url="http://api:8123") as http:
        answer = await http.get("/metrics/targets")
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.text)[0]["targets"] == ["api:8123"]
    assert len(json.loads(answer.text)) == (2 if nodes else 1)
