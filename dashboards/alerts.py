"""Recording and alerting rules, as data: what Prometheus loads, and what Grafana takes.

Who is woken: severity page wants a person now, ticket one in working hours. Each alert has a page in docs/runbooks/.

SLO burn rate over two windows (Google's SRE workbook, chapter 5): the budget of misses is 1 - objective; a burn of 14.4
spends 2 % of a month's budget in an hour, one of 6 spends 5 % in six hours. The short window ends the alert soon after.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

OBJECTIVE = 0.99
RUNBOOKS = "docs/runbooks"
_INTERVAL = "15s"
_WINDOWS = ("5m", "30m", "1h", "6h")
_BY = "model_name, class"


@dataclass(frozen=True)
class Recording:
    """A rule that keeps what an expression says."""

    record: str
    expr: str

    def to_json(self) -> dict[str, Any]:
        return {"record": self.record, "expr": self.expr}


@dataclass(frozen=True)
class Alert:
    """
    Attributes:
        expr: there is an alert for each of its series.
        lasting: for which it has to be there first.
        runbook: name of its page.
        raw_expr: the same without recorded series, for whoever does not have them; empty where it is the same.
    """

    name: str
    expr: str
    lasting: str
    severity: str
    runbook: str
    summary: str
    description: str
    raw_expr: str = ""

    @property
    def uid(self) -> str:
        """In Grafana: at most 40 characters."""
        return self.name.lower()

    def annotations(self, runbooks: str) -> dict[str, str]:
        return {
            "summary": self.summary,
            "description": self.description,
            "runbook_url": f"{runbooks.rstrip('/')}/{self.runbook}.md",
        }

    def to_json(self, runbooks: str) -> dict[str, Any]:
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.lasting,
            "labels": {"severity": self.severity},
            "annotations": self.annotations(runbooks),
        }


def miss_ratio(window: str) -> str:
    """Share of requests that missed a target, by model and class; nothing where none came."""
    kept = f"sum by ({_BY}) (increase(ellm_slo_kept_total[{window}]))"
    counted = f'sum by ({_BY}) (increase(ellm_slo_requests_total{{ending!="cancelled"}}[{window}]))'
    return f"1 - {kept} / ({counted} > 0)"


def recordings() -> tuple[Recording, ...]:
    return tuple(Recording(_recorded(window), miss_ratio(window)) for window in _WINDOWS)


def _recorded(window: str) -> str:
    return f"ellm:slo_miss:ratio_{window}"


def _burn(name: str, factor: float, windows: tuple[str, str], severity: str, objective: float) -> Alert:
    bound = f"{factor * (1 - objective):.6g}"
    raw = " and ".join(f"({miss_ratio(window)}) > {bound}" for window in windows)
    return Alert(
        name,
        " and ".join(f"{_recorded(window)} > {bound}" for window in windows),
        "2m",
        severity,
        "slo-burn",
        "Requests of class {{ $labels.class }} to {{ $labels.model_name }} miss their targets",
        f"{{{{ $value | humanizePercentage }}}} missed one within {windows[0]}; {objective:.4g} are to keep them.",
        raw,
    )


def alerts(objective: float = OBJECTIVE) -> tuple[Alert, ...]:
    """``objective``: share of the requests that are to keep their targets, above 0 and below 1."""
    return (
        _burn("EllmSloBurnFast", 14.4, ("1h", "5m"), "page", objective),
        _burn("EllmSloBurnSlow", 6.0, ("6h", "30m"), "ticket", objective),
        Alert(
            "EllmAway",
            'up{job="ellm"} == 0',
            "1m",
            "page",
            "away",
            "{{ $labels.instance }} does not answer",
            "Prometheus cannot read /metrics of the cluster: nobody can ask it for anything.",
        ),
        Alert(
            "EllmMemoryPressureStuck",
            "ellm_device_pressure == 2",
            "10m",
            "ticket",
            "memory-pressure",
            "{{ $labels.device }} on {{ $labels.node }} has been short of memory for ten minutes",
            "Requests want more KV memory than the device's budget, all the time.",
        ),
        Alert(
            "EllmMemoryOverdue",
            "ellm_lease_overdue_bytes > 0",
            "1m",
            "page",
            "memory-pressure",
            "Replica {{ $labels.replica }} does not give back memory that others wait for",
            "It owes {{ $value | humanize1024 }}B. Its processes are stopped or very slow.",
        ),
        Alert(
            "EllmHostBufferExhausted",
            'ellm_host_buffer_bytes{size="taken"} / ignoring (size) (ellm_host_buffer_bytes{size="physical"} > 0)'
            " > 0.95 and ignoring (size)"
            ' (sum without (event) (rate(ellm_host_buffer_events_total{event="evicted"}[5m])) > 0)',
            "10m",
            "ticket",
            "host-buffer",
            "The host buffer of replica {{ $labels.replica }} is full, and pushes blocks out",
            "{{ $value | humanizePercentage }} of it is taken; what is pushed out is computed again.",
        ),
        Alert(
            "EllmMigrationsFailing",
            'sum by (model_name) (increase(ellm_migrations_total{outcome!~"moved|rerouted"}[10m])) > '
            "0.5 * sum by (model_name) (increase(ellm_migrations_total[10m])) "
            "and sum by (model_name) (increase(ellm_migrations_total[10m])) > 3",
            "5m",
            "ticket",
            "migrations-failing",
            "Most requests of {{ $labels.model_name }} that should move to another replica do not",
            "{{ $value | humanize }} in ten minutes went on where they were, or were computed again elsewhere.",
        ),
        Alert(
            "EllmAgentSilent",
            "(max_over_time(ellm_device_report_age_seconds[15m]) unless ellm_device_report_age_seconds < 10)"
            " and on () (max(ellm_controller_reachable) == 1)",
            "30s",
            "page",
            "agent-silent",
            "The memory agent of {{ $labels.device }} on {{ $labels.node }} is silent",
            "No report has reached the controller for 10 s or more. Engines go on with the leases that they have.",
        ),
        Alert(
            "EllmControllerNotPlanning",
            "max(ellm_controller_reachable) == 0 or "
            '(sum(increase(ellm_controller_reports_total{outcome="applied"}[2m])) == 0'
            ' and sum(max_over_time(ellm_controller_reports_total{outcome="applied"}[1h])) > 0)',
            "1m",
            "page",
            "controller-not-planning",
            "The controller is away, or has taken in no report for two minutes",
            "Engines keep their last targets, routers go by what they see themselves.",
        ),
        Alert(
            "EllmReplicasFlapping",
            "sum by (node, device) (increase(ellm_device_dead_engines_total[15m])) > 2.5",
            "0s",
            "page",
            "replicas-flapping",
            "Engines on {{ $labels.device }} of {{ $labels.node }} die again and again",
            "{{ $value | humanize }} have ended within 15 minutes without having been stopped.",
        ),
        Alert(
            "EllmReplicasScaledToAndFro",
            'sum(increase(ellm_controller_decisions_total{kind="scale"}[15m])) > 10',
            "0s",
            "ticket",
            "replicas-flapping",
            "The number of replicas changes all the time",
            "{{ $value | humanize }} changes within 15 minutes; each start costs time and memory.",
        ),
    )


def rule_file(objective: float = OBJECTIVE, runbooks: str = RUNBOOKS) -> dict[str, Any]:
    """What Prometheus loads, as a tree for YAML."""
    return {
        "groups": [
            {"name": "ellm-slo", "interval": _INTERVAL, "rules": [rule.to_json() for rule in recordings()]},
            {"name": "ellm", "interval": _INTERVAL, "rules": [rule.to_json(runbooks) for rule in alerts(objective)]},
        ]
    }


def grafana_rules(
    objective: float, runbooks: str, folder_uid: str, datasource_uid: str, group: str = "ellm"
) -> Sequence[dict[str, Any]]:
    """The alerts as Grafana's provisioning API takes them: each fires for every series that its query returns. Recorded
    series are not needed."""
    return [_grafana_rule(rule, runbooks, folder_uid, datasource_uid, group) for rule in alerts(objective)]


def _grafana_rule(rule: Alert, runbooks: str, folder_uid: str, datasource_uid: str, group: str) -> dict[str, Any]:
    found = {
        "refId": "A",
        "relativeTimeRange": {"from": 600, "to": 0},
        "datasourceUid": datasource_uid,
        # 1 for any number, 0 included.
        "model": {"refId": "A", "expr": f"({rule.raw_expr or rule.expr}) > bool -Inf", "instant": True, "range": False},
    }
    condition = {
        "refId": "B",
        "relativeTimeRange": {"from": 600, "to": 0},
        "datasourceUid": "__expr__",
        "model": {
            "refId": "B",
            "type": "threshold",
            "expression": "A",
            "conditions": [{"evaluator": {"type": "gt", "params": [0]}}],
        },
    }
    return {
        "uid": rule.uid,
        "title": rule.name,
        "orgID": 1,
        "folderUID": folder_uid,
        "ruleGroup": group,
        "condition": "B",
        "data": [found, condition],
        "for": rule.lasting,
        "noDataState": "OK",
        "execErrState": "Error",
        "labels": {"severity": rule.severity},
        # Grafana's $value is not what the query found.
        "annotations": {key: value for key, value in rule.annotations(runbooks).items() if "$value" not in value},
    }
