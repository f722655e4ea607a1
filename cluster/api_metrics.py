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
from cluster.slo_ledger import SloLedger


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
    """Our metrics of the models' cores and doors, and of each replica's requests, read when they are scraped.

    A replica is named by its engine number, as in vLLM's metrics: there are no more of these than replicas.
    """

    def __init__(self, table: ModelTable, ledger: SloLedger) -> None:
        self._table, self._ledger = table, ledger

    def collect(self) -> Iterable[Metric]:
        by = ["model_name"]
        reachable = GaugeMetricFamily("ellm_replicas_reachable", "Replicas that answered the last poll.", labels=by)
        in_flight = GaugeMetricFamily("ellm_requests_in_flight", "Requests sent to replicas and not ended.", labels=by)
        retried = CounterMetricFamily(
            "ellm_requests_retried", "Requests sent again before their first token.", labels=by
        )
        continued = CounterMetricFamily(
            "ellm_requests_continued", "Answers that went on elsewhere when their replica had failed.", labels=by
        )
        waiting = GaugeMetricFamily("ellm_requests_waiting", "Requests that wait for a replica.", labels=by)
        tokens = GaugeMetricFamily("ellm_tokens_waiting", "Tokens of these, with their expected answers.", labels=by)
        limit = GaugeMetricFamily(
            "ellm_requests_limit", "Requests that this ingress lets into the replicas at once.", labels=by
        )
        each = [*by, "engine"]
        requests = CounterMetricFamily("ellm_slo_replica_requests", "Ended requests that it answered.", labels=each)
        kept = CounterMetricFamily("ellm_slo_replica_kept", "Of these, those that kept every target.", labels=each)
        about = "of predictions, as a part of what came: 0.1 is 10 % too long or too short."
        ttft = GaugeMetricFamily("ellm_predicted_ttft_error_ratio", f"Median error {about}", labels=by)
        tpot = GaugeMetricFamily("ellm_predicted_tpot_error_ratio", f"Median error {about}", labels=by)
        predicted = CounterMetricFamily("ellm_predicted_requests", "Requests whose TTFT was predicted.", labels=by)
        for model in self._table.routed:
            core = model.engine.engine_core
            predicted.add_metric([model.name], core.ttft_error.count)
            for family, error in ((ttft, core.ttft_error), (tpot, core.tpot_error)):
                if error.count:
                    family.add_metric([model.name], error.median)
            waiting.add_metric([model.name], core.door.waiting)
            tokens.add_metric([model.name], core.door.waiting_tokens)
            limit.add_metric([model.name], core.door.room.limit)
            tallies = self._ledger.account(model.name).by_replica
            for number, replica in core.replica_numbers.items():
                if replica in tallies:
                    requests.add_metric([model.name, str(number)], tallies[replica].counted)
                    kept.add_metric([model.name, str(number)], tallies[replica].kept)
            reachable.add_metric([model.name], core.reachable)
            in_flight.add_metric([model.name], core.in_flight)
            retried.add_metric([model.name], core.retried)
            continued.add_metric([model.name], core.continued)
        return [reachable, in_flight, waiting, tokens, limit, retried, continued, requests, kept, predicted, ttft, tpot]


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
    """The handler of GET /metrics: the process, every model that takes requests, and how requests have fared."""

    def __init__(self, table: ModelTable, ledger: SloLedger) -> None:
        self._table = table
        self._ours = [CollectorRegistry(), ledger.registry]
        self._ours[0].register(CoreCollector(table, ledger))

    async def __call__(self, request: Request) -> Response:
        models = (model.metrics for model in self._table.routed)
        merged = MergedRegistry([REGISTRY, *models, *self._ours])
        return Response(generate_latest(merged), headers={"Content-Type": CONTENT_TYPE_LATEST})
