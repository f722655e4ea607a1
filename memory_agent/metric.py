"""What a metric is: one entry of a catalogue, from which exporter, dashboards, alerts and documentation are made.

Each package has its catalogue: ``memory_agent.metrics``, ``replicas.metrics``, ``cluster.metrics``. Names follow
Prometheus: a base unit as suffix, ``_total`` for what only grows.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, TypeVar

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from memory_agent.errors import SettingsError

_UNIT_SUFFIXES = ("bytes", "seconds", "ratio", "tokens", "blocks", "timestamp_seconds")

Report = TypeVar("Report")


class Kind(StrEnum):
    """Prometheus' types."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class MetricSpec:
    """One metric.

    Attributes:
        name: as in PromQL, a histogram's without ``_bucket``.
        unit: in words of the field: bytes, seconds, tokens, blocks, requests, ...
        labels: names; values: all that a label can have, where the label is an enumeration of ours.
        help: one sentence.

    Raises SettingsError on construction for a name that does not say what it is.
    """

    name: str
    kind: Kind
    unit: str
    labels: tuple[str, ...]
    help: str
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.name.startswith("ellm_"):
            return  # named by others
        if (self.kind is Kind.COUNTER) != self.name.endswith("_total"):
            raise SettingsError(f"{self.name} is a {self.kind}: counters, and they alone, end in _total")
        stem = self.name.removesuffix("_total")
        for suffix in _UNIT_SUFFIXES:
            if suffix.rpartition("_")[2] == self.unit and not stem.endswith(f"_{self.unit}"):
                raise SettingsError(f"{self.name} is in {self.unit}: its name has to end so")

    @property
    def series(self) -> tuple[str, ...]:
        """Names of its time series in Prometheus."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)

    def family(self) -> Metric:
        """Empty, for ``add_metric``. Histograms are prometheus_client's own."""
        of: type[CounterMetricFamily | GaugeMetricFamily] = (
            CounterMetricFamily if self.kind is Kind.COUNTER else GaugeMetricFamily
        )
        return of(self.name.removesuffix("_total"), self.help, labels=self.labels)


@dataclass(frozen=True)
class Reading(Generic[Report]):
    """A metric that is read out of reports.

    read: the value, or values by that label of the metric which the reports' own labels do not give.
    """

    metric: MetricSpec
    read: Callable[[Report], float | Mapping[str, float]]


def families(readings: Sequence[Reading[Report]], reports: Iterable[tuple[Mapping[str, str], Report]]) -> list[Metric]:
    """The metrics of these reports, each of which comes with its own labels."""
    made: list[tuple[Reading[Report], Any]] = [(reading, reading.metric.family()) for reading in readings]
    for labels, report in reports:
        for reading, family in made:
            value = reading.read(report)
            names = reading.metric.labels
            if isinstance(value, Mapping):
                for key, one in value.items():
                    family.add_metric([labels.get(name, key) for name in names], one)
            else:
                family.add_metric([labels[name] for name in names], value)
    return [family for _, family in made]
