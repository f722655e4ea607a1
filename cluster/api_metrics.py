"""What /metrics shows: vLLM's metrics of every model of this ingress, and ours."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import cast

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from vllm.v1.metrics.loggers import PrometheusStatLogger

from cluster.model_table import ModelTable


def stat_logger_in(registry: CollectorRegistry) -> type[PrometheusStatLogger]:
    """vLLM's Prometheus logger, writing to ``registry``.

    vLLM's own writes to the process's default registry and clears it first: a second model's engine would erase the
    first's.
    """

    class RegistryStatLogger(PrometheusStatLogger):
        _gauge_cls = cast(type[Gauge], partial(Gauge, registry=registry))
        _counter_cls = cast(type[Counter], partial(Counter, registry=registry))
        _histogram_cls = cast(type[Histogram], partial(Histogram, registry=registry))

    return RegistryStatLogger


class CoreCollector(Collector):
    """Our metrics of the models' cores, read when they are scraped."""

    def __init__(self, table: ModelTable) -> None:
        self._table = table

    def collect(self) -> Iterable[Metric]:
        by = ["model_name"]
        reachable = GaugeMetricFamily("ellm_replicas_reachable", "Replicas that answered the last poll.", labels=by)
        in_flight = GaugeMetricFamily("ellm_requests_in_flight", "Requests sent to replicas and not ended.", labels=by)
        retried = CounterMetricFamily(
            "ellm_requests_retried", "Requests sent again before their first token.", labels=by
        )
        for model in self._table.routed:
            core = model.engine.engine_core
            reachable.add_metric([model.name], core.reachable)
            in_flight.add_metric([model.name], core.in_flight)
            retried.add_metric([model.name], core.retried)
        return [reachable, in_flight, retried]


class MergedRegistry(CollectorRegistry):
    """Several registries as one: families of the same name are one family, as the exposition format wants it."""

    def __init__(self, registries: Sequence[CollectorRegistry]) -> None:
        super().__init__(auto_describe=False)
        self._registries = registries

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for registry in self._registries:
            for metric in registry.collect():
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                family.samples.extend(metric.samples)
        return families.values()


class MetricsEndpoint:
    """The handler of GET /metrics: the process, and every model that takes requests."""

    def __init__(self, table: ModelTable) -> None:
        self._table = table
        self._ours = CollectorRegistry()
        self._ours.register(CoreCollector(table))

    async def __call__(self, request: Request) -> Response:
        models = (model.metrics for model in self._table.routed)
        merged = MergedRegistry([REGISTRY, *models, self._ours])
        return Response(generate_latest(merged), headers={"Content-Type": CONTENT_TYPE_LATEST})
