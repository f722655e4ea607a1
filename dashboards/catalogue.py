"""All metrics of the cluster, by package: what dashboards, alerts and documentation may speak of."""

from collections.abc import Iterator

from cluster.metrics import CONTROLLER_METRICS, INGRESS_LABEL, INGRESS_METRICS, VLLM_METRICS
from memory_agent.metric import MetricSpec
from memory_agent.metrics import DEVICE_METRICS, ENGINE_METRICS
from replicas.metrics import REPLICA_METRICS

GROUPS: dict[str, tuple[MetricSpec, ...]] = {
    "Devices": tuple(reading.metric for reading in DEVICE_METRICS),
    "Leases and memory of replicas": tuple(reading.metric for reading in ENGINE_METRICS),
    "Engines": tuple(reading.metric for reading in REPLICA_METRICS),
    "Controller": CONTROLLER_METRICS,
    "Ingress": INGRESS_METRICS,
    "vLLM": VLLM_METRICS,
}
OF_INGRESS = ("Ingress", "vLLM")
"""Groups whose series have the label ``ingress`` too."""


def all_metrics() -> Iterator[MetricSpec]:
    for group in GROUPS.values():
        yield from group


def labels_of(group: str, metric: MetricSpec) -> tuple[str, ...]:
    """Of its series at /metrics."""
    return (*metric.labels, INGRESS_LABEL) if group in OF_INGRESS else metric.labels


SERIES: dict[str, tuple[str, ...]] = {
    name: labels_of(group, metric) for group, metrics in GROUPS.items() for metric in metrics for name in metric.series
}
"""Labels by the name of a time series."""
