"""How the requests of one ingress process have fared: an account for each model, and what Prometheus reads of it."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cluster.metrics import SLO_GOOD_TOKENS, SLO_KEPT, SLO_REQUESTS, SLO_TPOT, SLO_TTFT
from cluster.slo import Ending, Outcome, SloAccount
from memory_agent.metric import MetricSpec

TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
TPOT_BUCKETS_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class SloReport:
    """What one ingress process has counted since it started, ``duration_s`` ago. Crosses processes."""

    account: SloAccount
    duration_s: float


class SloLedger(Collector):
    """Belongs to the event loop of its ingress."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._accounts: dict[str, SloAccount] = {}
        self._began_s = time.monotonic()
        self._ttft = self._histogram(SLO_TTFT, TTFT_BUCKETS_S)
        self._tpot = self._histogram(SLO_TPOT, TPOT_BUCKETS_S)
        self.registry.register(self)

    def account(self, model: str) -> SloAccount:
        """Of the requests to that model."""
        return self._accounts.get(model) or SloAccount()

    def add(self, outcome: Outcome) -> None:
        """Count a request that has ended."""
        self._accounts.setdefault(outcome.model, SloAccount()).add(outcome)
        if not math.isnan(outcome.ttft_s):
            self._ttft.labels(outcome.model, outcome.slo_class).observe(outcome.ttft_s)
            if outcome.output_tokens > 1:
                self._tpot.labels(outcome.model, outcome.slo_class).observe(outcome.tpot_s)

    def report(self) -> SloReport:
        """Over all models."""
        return SloReport(merged(self._accounts.values()), time.monotonic() - self._began_s)

    def collect(self) -> Iterable[Metric]:
        """The counters, read from the accounts when they are scraped. Each ending is there from the first request of
        its class on: Prometheus sees no increase in a counter that begins above 0."""
        made: list[Any] = [spec.family() for spec in (SLO_REQUESTS, SLO_KEPT, SLO_GOOD_TOKENS)]
        requests, kept, tokens = made
        for model, account in self._accounts.items():
            for name, tally in account.by_class.items():
                for ending in Ending:
                    requests.add_metric([model, name, str(ending)], tally.endings[ending])
                kept.add_metric([model, name], tally.kept)
                tokens.add_metric([model, name], tally.good_tokens)
        return made

    def _histogram(self, spec: MetricSpec, buckets: Sequence[float]) -> Histogram:
        return Histogram(spec.name, spec.help, spec.labels, registry=self.registry, buckets=buckets)


def merged(accounts: Iterable[SloAccount]) -> SloAccount:
    """One account of all."""
    whole = SloAccount()
    for account in accounts:
        whole.merge(account)
    return whole


def to_json(reports: Sequence[SloReport]) -> Mapping[str, Any]:
    """What the ingress processes have counted, JSON-ready. Rates are over the life of the oldest."""
    duration_s = max((report.duration_s for report in reports), default=0.0)
    whole = merged(report.account for report in reports)
    return {"ingresses": len(reports), "duration_s": duration_s, **whole.to_json(duration_s)}
