"""`ellm top`: the live page's state in a terminal."""

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import cluster.top
from cluster.cli import app
from cluster.readiness import NoAnswer
from cluster.recent_slo import RecentSlo
from cluster.status import render_status
from cluster.top import render_top
from tests.unit.cluster.test_status import replica, snapshot

DECISION = {"age_s": 65.0, "kind": "target", "subject": "a#r1", "action": "512 tokens", "reason": "late", "inputs": {}}


def state(status: dict[str, Any]) -> dict[str, Any]:
    return {"status": status, "recent": RecentSlo().add(status["slo"], 0.0), "decisions": [DECISION]}


def shown(value: dict[str, Any], width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(render_top(value))
    return console.export_text()


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Let the cluster answer with a status, or with an error."""

    def install(status: Any) -> None:
        def read(url: str) -> dict[str, Any]:
            if isinstance(status, Exception):
                raise status
            found: dict[str, Any] = status
            return found

        monkeypatch.setattr(cluster.top, "read_status", read)
        monkeypatch.setattr(cluster.top, "read_decisions", lambda url, count, subject: [DECISION][:count])

    return install


@pytest.mark.parametrize("width", [80, 140])
def test_memory_replicas_slo_and_decisions_are_there(width: int) -> None:
    """What the page shows, at the width of any terminal."""
    text = shown(state(snapshot(replica("a#r1"), replica("a#r2", waiting=7))), width)
    for part in ("cpu on 01234567", "ELEVATED", "free 974Mi", "weights 538Mi", "r1", "r2", "50.0Mi", "512Mi"):
        assert part in text
    for part in ("chat", "75.0%", "target r1: 512 tokens", "because late", "1m ago"):
        assert part in text
    assert max(map(len, text.splitlines())) <= width


def test_a_bar_is_as_long_as_its_shares() -> None:
    """Used and held are drawn to the scale of the largest lease, which is marked at the end."""
    one = replica("a#r1", used_bytes=128 << 20, held_bytes_os=256 << 20, limit_bytes=512 << 20)
    line = next(line for line in shown(state(snapshot(one))).splitlines() if line.startswith("r1"))
    assert (line.count("█"), line.count("░"), line.count("│")) == (10, 9, 1)


@pytest.mark.parametrize("name", ["x[/b]", "[red]x"])
def test_names_are_no_markup(name: str) -> None:
    """Who adds a model names it as they like; it is shown as it is."""
    one = replica("a#r1", model=name)
    assert name in shown(state(snapshot(one)))
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(render_status(snapshot(one) | {"models": [{"name": name, "phase": "adding"}]}))
    assert console.export_text().count(name) == 2


def test_a_cluster_without_devices_says_so() -> None:
    """Agents away: no table, the reason instead."""
    status = snapshot() | {"nodes": [], "absent_devices": [{"node": "n", "device": "cpu", "report_age_s": 9.0}]}
    text = shown(state(status))
    assert "no memory agent has reported" in text and "n cpu: counted as absent" in text


def test_once_as_json_is_one_line_of_the_whole_state(answers: Callable[[Any], None]) -> None:
    """For scripts: status, the last minute and decisions."""
    answers(status := snapshot(replica("a#r1")))
    result = CliRunner().invoke(app, ["top", "--once", "--json"])
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert (told["status"], told["decisions"]) == (json.loads(json.dumps(status)), [DECISION])


def test_no_cluster_is_an_error_with_its_reason(answers: Callable[[Any], None]) -> None:
    """At the first look; exit status 1."""
    answers(NoAnswer("no cluster answers at there"))
    result = CliRunner().invoke(app, ["top", "--once"])
    assert (result.exit_code, "no cluster answers" in result.output) == (1, True)
