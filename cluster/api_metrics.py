"""What /metrics shows: the whole cluster, whichever ingress process is asked.

    controller --ControllerMeasures--> devices, leases, replicas, controller     once
    every ingress process -----------> vLLM's metrics of every model, and ours   with the label ``ingress``

So one address is all that Prometheus needs, and nothing is counted twice. Processes are asked while the scrape waits;
one that does not answer is left out of that scrape.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from itertools import chain, product
from typing import cast

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from vllm.v1.metrics.loggers import PrometheusStatLogger

from cluster.admission import Verdict
from cluster.cluster_status import ControllerAwayError, read_measures
from cluster.cluster_view import ControllerMeasures
from cluster.ingress_peers import IngressPeers
from cluster.metrics import (
    ACTUAL_SECONDS,
    ADMISSION_REQUESTS,
    ADMISSION_WAIT,
    CONTROLLER_DECISIONS,
    CONTROLLER_REACHABLE,
    CONTROLLER_REPORTS,
    CONTROLLER_START,
    INGRESS_LABEL,
    MIGRATION_DOWNTIME,
    MIGRATION_DOWNTIMES,
    MIGRATIONS,
    PREDICTED_REQUESTS,
    PREDICTED_SECONDS,
    PREDICTION_ERROR,
    REPLICA_INFO,
    REPLICAS_DRAINING,
    REPLICAS_REACHABLE,
    REPORT_AGE,
    REQUESTS_CONTINUED,
    REQUESTS_IN_FLIGHT,
    REQUESTS_LIMIT,
    REQUESTS_RESUMED,
    REQUESTS_RETRIED,
    REQUESTS_WAITING,
    SLO_REPLICA_KEPT,
    SLO_REPLICA_REQUESTS,
    TOKENS_RESUMED,
    TOKENS_WAITING,
)
from cluster.metrics_text import CONTENT_TYPE, TextFamilies, merged_text, text_families
from cluster.model_table import ModelTable, ServedModel
from cluster.move import MoveOutcome, Trigger
from cluster.slo_ledger import SloLedger
from memory_agent.metric import MetricSpec, families
from memory_agent.metrics import DEVICE_METRICS, ENGINE_METRICS, device_labels, engine_labels
from memory_agent.reports import replica_name
from replicas.metrics import REPLICA_METRICS

CONTROLLER_TIMEOUT_S = 2.0


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


class _Families:
    """Metric families by their entry of the catalogue, in the order in which they are first used."""

    def __init__(self) -> None:
        self._made: dict[MetricSpec, Metric] = {}

    def add(self, spec: MetricSpec, labels: Sequence[str], value: float) -> None:
        if spec not in self._made:
            self._made[spec] = spec.family()
        self._made[spec].add_metric(labels, value)  # type: ignore[attr-defined]  # of the families of both kinds

    def all(self) -> list[Metric]:
        return list(self._made.values())


class CoreCollector(Collector):
    """Our metrics of the models' cores and doors, and of each replica's requests, read when they are scraped.

    A replica is named by its engine number, as in vLLM's metrics: there are no more of these than replicas.
    """

    def __init__(self, table: ModelTable, ledger: SloLedger) -> None:
        self._table, self._ledger = table, ledger

    def collect(self) -> Iterable[Metric]:
        made = _Families()
        for model in self._table.routed:
            self._collect(model, made)
        return made.all()

    def _collect(self, model: ServedModel, made: _Families) -> None:
        name, core = model.name, model.engine.engine_core
        door = core.door
        for spec, value in (
            (REPLICAS_REACHABLE, core.reachable),
            (REQUESTS_IN_FLIGHT, core.in_flight),
            (REQUESTS_RETRIED, core.retried),
            (REQUESTS_CONTINUED, core.continued),
            (REQUESTS_RESUMED, core.resumption.requests),
            (TOKENS_RESUMED, core.resumption.tokens),
            (REPLICAS_DRAINING, sum(replica.draining for replica in core.replicas)),
            (MIGRATION_DOWNTIMES, core.mover.downtimes),
            (MIGRATION_DOWNTIME, core.mover.downtime_s),
            (REQUESTS_WAITING, door.waiting),
            (TOKENS_WAITING, door.waiting_tokens),
            (REQUESTS_LIMIT, door.room.limit),
        ):
            made.add(spec, [name], value)
        for trigger, outcome in product(Trigger, MoveOutcome):
            made.add(MIGRATIONS, [name, trigger, outcome], core.mover.counts[trigger, outcome])
        for slo_class in sorted({slo_class for slo_class, _ in door.verdicts}):
            for verdict in Verdict:
                made.add(ADMISSION_REQUESTS, [name, slo_class, verdict], door.verdicts[slo_class, verdict])
            made.add(ADMISSION_WAIT, [name, slo_class], door.waited_s.get(slo_class, 0.0))
        for latency, error in (("ttft", core.ttft_error), ("tpot", core.tpot_error)):
            made.add(PREDICTED_REQUESTS, [name, latency], error.count)
            made.add(PREDICTED_SECONDS, [name, latency], error.predicted_s)
            made.add(ACTUAL_SECONDS, [name, latency], error.actual_s)
            if error.count:
                made.add(PREDICTION_ERROR, [name, latency], error.median)
        tallies = self._ledger.account(name).by_replica
        for number, replica in core.replica_numbers.items():
            engine = [name, str(number)]
            made.add(REPLICA_INFO, [*engine, replica_name(replica)], 1)
            if replica in tallies:
                made.add(SLO_REPLICA_REQUESTS, engine, tallies[replica].counted)
                made.add(SLO_REPLICA_KEPT, engine, tallies[replica].kept)


def cluster_families(measures: ControllerMeasures | None) -> list[Metric]:
    """What the controller knows; None where it is away."""
    made = _Families()
    made.add(CONTROLLER_REACHABLE, [], measures is not None)
    if measures is None:
        return made.all()
    made.add(CONTROLLER_START, [], measures.started_s)
    for outcome, count in measures.outcomes.items():
        made.add(CONTROLLER_REPORTS, [outcome], count)
    for kind, count in measures.decisions.items():
        made.add(CONTROLLER_DECISIONS, [kind], count)
    for (node, device), age_s in measures.ages_s.items():
        made.add(REPORT_AGE, [node, device], age_s)
    engines = [(engine_labels(report, one), one) for report in measures.reports for one in report.engines]
    return [
        *made.all(),
        *families(DEVICE_METRICS, [(device_labels(report), report) for report in measures.reports]),
        *families((*ENGINE_METRICS, *REPLICA_METRICS), engines),
    ]


class IngressMetrics:
    """The metrics of one ingress process, of that rank."""

    def __init__(self, table: ModelTable, ledger: SloLedger, rank: int = 0) -> None:
        self._table, self._ledger, self._rank = table, ledger, rank
        self._core = CoreCollector(table, ledger)

    async def read(self) -> TextFamilies:
        """Ours are read here, on the event loop that they belong to; vLLM's and the process's elsewhere, because there
        are thousands of them, and tokens wait meanwhile."""
        ours = [*self._core.collect(), *self._ledger.registry.collect()]
        registries = [REGISTRY, *(model.metrics for model in self._table.routed)]

        def write() -> TextFamilies:
            theirs = chain.from_iterable(registry.collect() for registry in registries)
            return text_families(chain(theirs, ours), {INGRESS_LABEL: str(self._rank)})

        return await asyncio.to_thread(write)


class MetricsEndpoint:
    """The handler of GET /metrics.

    Args:
        own: of this process; peers: all of them.
        measures: asks the controller, within so many seconds, and raises ControllerAwayError.
    """

    def __init__(
        self,
        own: IngressMetrics,
        peers: IngressPeers,
        measures: Callable[[float], Awaitable[ControllerMeasures]] = read_measures,
    ) -> None:
        self._own, self._peers, self._measures = own, peers, measures

    async def __call__(self, request: Request) -> Response:
        cluster, ingresses = await asyncio.gather(self._cluster(), self._ingresses())
        return Response(merged_text([text_families(cluster), *ingresses]), headers={"Content-Type": CONTENT_TYPE})

    async def _ingresses(self) -> list[TextFamilies]:
        return await self._peers.ask("metrics") or [await self._own.read()]

    async def _cluster(self) -> list[Metric]:
        try:
            return cluster_families(await self._measures(CONTROLLER_TIMEOUT_S))
        except ControllerAwayError:
            return cluster_families(None)
