"""The rules: what promtool says to them, and that each alert fires when it should and not before."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from dashboards.alerts import RUNBOOKS, alerts, grafana_rules, recordings, rule_file
from dashboards.catalogue import SERIES
from tests.unit.dashboards.prometheus_binaries import binary
from tests.unit.dashboards.promql_names import grouping_in, matchers_in, metrics_in

DEVICE = 'node="n", device="cpu"'
ENGINE = f'{DEVICE}, model_name="m", replica="r"'
CLASS = 'model_name="m", class="chat", ingress="0"'
STEPS = 600
"""Of a minute: ten hours."""


@dataclass(frozen=True)
class Case:
    """Series by name, in promtool's notation from minute 0 on, a number each ``step``; at ``at`` the alert fires with
    these labels, or, where there are none, no one does."""

    alert: str
    series: dict[str, str]
    at: str
    labels: dict[str, str] | None
    step: str = "15s"


def slo(missed: int, of: int = 100) -> dict[str, str]:
    """So many of ``of`` requests a step miss their targets, for ten hours; those that are cancelled are nobody's."""
    return {
        f'ellm_slo_requests_total{{{CLASS}, ending="answered"}}': f"0+{of}x{STEPS}",
        f'ellm_slo_requests_total{{{CLASS}, ending="cancelled"}}': f"0+500x{STEPS}",
        f"ellm_slo_kept_total{{{CLASS}}}": f"0+{of - missed}x{STEPS}",
    }


def buffer(taken: int, evicted: int) -> dict[str, str]:
    return {
        f'ellm_host_buffer_bytes{{{ENGINE}, size="taken"}}': f"{taken}x100",
        f'ellm_host_buffer_bytes{{{ENGINE}, size="physical"}}': "100x100",
        f'ellm_host_buffer_events_total{{{ENGINE}, event="evicted"}}': f"0+{evicted}x100",
        f'ellm_host_buffer_events_total{{{ENGINE}, event="stored"}}': "0+9x100",
    }


def migrations(moved: int, failed: int, rerouted: int = 0) -> dict[str, str]:
    """So many a step."""
    labels = 'model_name="m", trigger="drain", ingress="0"'
    return {
        f'ellm_migrations_total{{{labels}, outcome="moved"}}': f"0+{moved}x100",
        f'ellm_migrations_total{{{labels}, outcome="failed"}}': f"0+{failed}x100",
        f'ellm_migrations_total{{{labels}, outcome="rerouted"}}': f"0+{rerouted}x100",
    }


REACHABLE = {"ellm_controller_reachable": "1x400"}
AGE = f"ellm_device_report_age_seconds{{{DEVICE}}}"
APPLIED = 'ellm_controller_reports_total{outcome="applied"}'
ON_DEVICE = {"node": "n", "device": "cpu"}
ON_ENGINE = {**ON_DEVICE, "model_name": "m", "replica": "r"}
OF_CLASS = {"model_name": "m", "class": "chat"}

CASES = [
    Case("EllmSloBurnFast", slo(missed=20), "90m", OF_CLASS, "1m"),
    Case("EllmSloBurnFast", slo(missed=10), "90m", None, "1m"),
    Case(
        "EllmSloBurnFast",
        {name: f"{line.rpartition('x')[0]}x60 _x100" for name, line in slo(20).items()},
        "75m",
        None,
        "1m",
    ),
    Case("EllmSloBurnSlow", slo(missed=8), "9h", OF_CLASS, "1m"),
    Case("EllmSloBurnSlow", slo(missed=4), "9h", None, "1m"),
    Case("EllmAway", {'up{job="ellm", instance="i"}': "0x40"}, "5m", {"job": "ellm", "instance": "i"}),
    Case("EllmAway", {'up{job="ellm", instance="i"}': "0 0 1 0 0 1x40"}, "5m", None),
    Case("EllmMemoryPressureStuck", {f"ellm_device_pressure{{{DEVICE}}}": "2x60"}, "12m", ON_DEVICE),
    Case("EllmMemoryPressureStuck", {f"ellm_device_pressure{{{DEVICE}}}": "2x30 1 2x30"}, "12m", None),
    Case("EllmMemoryOverdue", {f"ellm_lease_overdue_bytes{{{ENGINE}}}": "5x20"}, "4m", ON_ENGINE),
    Case("EllmMemoryOverdue", {f"ellm_lease_overdue_bytes{{{ENGINE}}}": "5 5 0x20"}, "4m", None),
    Case("EllmHostBufferExhausted", buffer(taken=96, evicted=3), "16m", ON_ENGINE),
    Case("EllmHostBufferExhausted", buffer(taken=96, evicted=0), "16m", None),
    Case("EllmHostBufferExhausted", buffer(taken=80, evicted=3), "16m", None),
    Case("EllmMigrationsFailing", migrations(moved=1, failed=2), "16m", {"model_name": "m"}),
    Case("EllmMigrationsFailing", migrations(moved=2, failed=1), "16m", None),
    Case("EllmMigrationsFailing", migrations(moved=0, failed=0), "16m", None),
    Case("EllmMigrationsFailing", migrations(moved=1, failed=1, rerouted=4), "16m", None),
    Case("EllmAgentSilent", REACHABLE | {AGE: "0.2x20 15 30 45 60 _x200"}, "9m", ON_DEVICE),
    Case("EllmAgentSilent", REACHABLE | {AGE: "0.2x20 5 0.2x200"}, "9m", None),
    Case("EllmAgentSilent", {"ellm_controller_reachable": "1x20 0x200", AGE: "0.2x20 _x200"}, "9m", None),
    Case("EllmControllerNotPlanning", {"ellm_controller_reachable": "1x20 0x60"}, "8m", {}),
    Case("EllmControllerNotPlanning", REACHABLE | {APPLIED: "0+60x40 2400x100"}, "16m", {}),
    Case("EllmControllerNotPlanning", REACHABLE | {APPLIED: "0+60x200"}, "16m", None),
    Case("EllmControllerNotPlanning", REACHABLE | {APPLIED: "0x200"}, "16m", None),
    Case(
        "EllmReplicasFlapping", {f"ellm_device_dead_engines_total{{{DEVICE}}}": "0x4 1x10 2x10 3x60"}, "10m", ON_DEVICE
    ),
    Case("EllmReplicasFlapping", {f"ellm_device_dead_engines_total{{{DEVICE}}}": "0x4 1x10 2x60"}, "10m", None),
    Case("EllmReplicasScaledToAndFro", {'ellm_controller_decisions_total{kind="scale"}': "0+1x60"}, "10m", {}),
    Case("EllmReplicasScaledToAndFro", {'ellm_controller_decisions_total{kind="scale"}': "0x8 2x60"}, "10m", None),
]


def promtool(*arguments: str) -> str:
    done = subprocess.run([binary("promtool"), *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file: Path = tmp_path_factory.mktemp("rules") / "ellm.yaml"
    file.write_text(yaml.safe_dump(rule_file(), sort_keys=False, width=1000), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def bare_rules(rules: Path) -> Path:
    """Without annotations, which promtool would compare too, numbers and all."""
    tree = yaml.safe_load(rules.read_text(encoding="utf-8"))
    for group in tree["groups"]:
        for rule in group["rules"]:
            rule.pop("annotations", None)
    file = rules.with_name("bare.yaml")
    file.write_text(yaml.safe_dump(tree, sort_keys=False, width=1000), encoding="utf-8")
    return file


def test_promtool_takes_the_rules(rules: Path) -> None:
    """They are well-formed, all of them."""
    assert f"{len(alerts()) + len(recordings())} rules found" in promtool("check", "rules", str(rules))


@pytest.mark.parametrize("case", CASES, ids=[f"{at}-{case.alert}" for at, case in enumerate(CASES)])
def test_an_alert_fires_when_it_should(case: Case, bare_rules: Path) -> None:
    """Given these series, promtool evaluates the rule to exactly that."""
    rule = next(one for one in alerts() if one.name == case.alert)
    expected: list[dict[str, Any]] = []
    if case.labels is not None:
        expected = [{"exp_labels": {"severity": rule.severity, **case.labels}}]
    test = {
        "interval": case.step,
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "alert_rule_test": [{"eval_time": case.at, "alertname": case.alert, "exp_alerts": expected}],
    }
    tests = {"rule_files": [str(bare_rules)], "evaluation_interval": case.step, "tests": [test]}
    file = bare_rules.with_name("test.yaml")
    file.write_text(yaml.safe_dump(tests), encoding="utf-8")
    promtool("test", "rules", str(file))


def test_each_alert_is_tested_both_ways() -> None:
    """There is a case in which it fires, and one in which it does not."""
    for fires in (True, False):
        assert {case.alert for case in CASES if (case.labels is not None) == fires} == {one.name for one in alerts()}


def test_rules_ask_for_what_is_exported() -> None:
    """Every metric of an expression is in the catalogue or recorded, selected and grouped by labels that it has."""
    recorded = {rule.record for rule in recordings()}
    for rule in (*alerts(), *recordings()):
        for expr in filter(None, (rule.expr, getattr(rule, "raw_expr", ""))):
            names = metrics_in(expr)
            assert names <= SERIES.keys() | recorded
            for metric, labels in matchers_in(expr):
                assert labels <= set(SERIES[metric])
            known = {label for name in names - recorded for label in SERIES[name]}
            assert grouping_in(expr) <= known or not names - recorded


def test_each_alert_has_its_page() -> None:
    """The runbook is there and names the alert; no page is of an alert that is not."""
    folder = Path(__file__).parents[3] / RUNBOOKS
    for rule in alerts():
        assert rule.name in (folder / f"{rule.runbook}.md").read_text(encoding="utf-8").splitlines()[0]
        assert rule.annotations("https://x/y/")["runbook_url"] == f"https://x/y/{rule.runbook}.md"
    assert {page.stem for page in folder.glob("*.md")} == {rule.runbook for rule in alerts()}
    named = {name for page in folder.glob("*.md") for name in re.findall(r"\bEllm\w+", page.read_text("utf-8"))}
    assert named == {rule.name for rule in alerts()}


def test_grafana_needs_nothing_recorded() -> None:
    """Grafana's rules ask for what is scraped alone, and promtool takes each expression."""
    rules = grafana_rules(0.99, RUNBOOKS, "f", "d")
    assert len({rule["uid"] for rule in rules}) == len(alerts())
    for rule in rules:
        expr = rule["data"][0]["model"]["expr"]
        assert "ellm:" not in expr
        assert len(rule["uid"]) <= 40


def test_a_tighter_objective_fires_earlier() -> None:
    """The bound of a burn rate is that many times the budget of misses."""
    bounds = [float(alerts(objective)[0].expr.split("> ")[1].split(" ")[0]) for objective in (0.9, 0.99, 0.999)]
    assert bounds == [pytest.approx(14.4 * miss) for miss in (0.1, 0.01, 0.001)]
