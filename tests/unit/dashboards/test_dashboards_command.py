"""`ellm dashboards`: what is exported, and what a push makes of a Grafana."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from dashboards.alerts import alerts
from dashboards.boards import BOARDS
from dashboards.command import TOKEN_VARIABLE, dashboards_app
from dashboards.files import DATASOURCE_UID, FOLDER_UID
from tests.unit.dashboards.fake_grafana import TOKEN, FakeGrafana, fake_grafana

COUNT = 2 + len(BOARDS) + len(alerts())
"""Folder, datasource, dashboards, rules."""


def run(*arguments: str, token: str = TOKEN) -> Result:
    return CliRunner().invoke(dashboards_app, list(arguments), env={TOKEN_VARIABLE: token})


def push(grafana: FakeGrafana, *more: str, token: str = TOKEN) -> Result:
    pytest.importorskip("grafana_client", reason="grafana-client is not installed")
    return run("push", "--grafana", grafana.url, *more, token=token)


@pytest.fixture
def grafana() -> Iterator[FakeGrafana]:
    with fake_grafana() as grafana:
        yield grafana


def test_export_writes_what_grafana_and_prometheus_take(tmp_path: Path) -> None:
    """A file a dashboard, rules, provisioning; every file parses; a second export writes the same."""
    done = run("export", str(tmp_path / "out"), "--url", "http://cluster:8000/", "--json")
    assert done.exit_code == 0
    files = [Path(name) for name in json.loads(done.output)]
    assert {file.stem for file in files if file.suffix == ".json"} == {board.uid for board in BOARDS}
    before = {file: file.read_text(encoding="utf-8") for file in files}
    trees = {file.name: yaml.safe_load(text) for file, text in before.items() if file.suffix == ".yaml"}
    (scrape,) = trees["prometheus.yaml"]["scrape_configs"]
    assert scrape["http_sd_configs"] == [{"url": "http://cluster:8000/metrics/targets"}]
    run("export", str(tmp_path / "out"), "--url", "http://cluster:8000/")
    assert {file: file.read_text(encoding="utf-8") for file in files} == before


def test_export_says_why_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("export", str(tmp_path / "file"))
    assert done.exit_code == 1 and "cannot write" in done.output


def test_a_push_puts_everything_there_and_again_changes_nothing(grafana: FakeGrafana) -> None:
    """Folder, datasource, dashboards in the folder, rules that ask the datasource."""
    first = push(grafana)
    assert first.exit_code == 0 and first.output.count("created") == COUNT
    assert set(grafana.things["dashboards"]) == {board.uid for board in BOARDS}
    assert all(board["meta"]["folderUid"] == FOLDER_UID for board in grafana.things["dashboards"].values())
    for rule in grafana.things["rules"].values():
        assert rule["folderUID"] == FOLDER_UID and rule["data"][0]["datasourceUid"] == DATASOURCE_UID
    grafana.writes.clear()
    again = push(grafana, "--json")
    assert set(json.loads(again.output).values()) == {"unchanged"} and grafana.writes == []


def test_what_was_changed_by_hand_is_put_right(grafana: FakeGrafana) -> None:
    """A dashboard, the datasource and a rule that differ are updated; the rest is left alone."""
    push(grafana)
    grafana.things["dashboards"][BOARDS[0].uid]["dashboard"]["title"] = "mine"
    grafana.things["datasources"][DATASOURCE_UID]["url"] = "http://other"
    uid = alerts()[0].uid
    grafana.things["rules"][uid]["for"] = "9h"
    grafana.writes.clear()
    changes = json.loads(push(grafana, "--json").output)
    updated = {what for what, change in changes.items() if change == "updated"}
    assert updated == {f"dashboard {BOARDS[0].title}", "datasource", f"alert rule {alerts()[0].name}"}
    assert len(grafana.writes) == 3
    assert grafana.things["rules"][uid]["for"] == alerts()[0].lasting


def test_a_grafana_below_a_path() -> None:
    """As behind a proxy."""
    with fake_grafana("/tools/grafana") as grafana:
        done = push(grafana)
        assert done.exit_code == 0 and done.output.count("created") == COUNT


def test_the_token_comes_from_a_file_too(grafana: FakeGrafana, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert push(grafana, "--token-file", str(tmp_path / "token"), token="").exit_code == 0


@pytest.mark.parametrize(
    ("token", "said"), [("", "there is no token in the variable"), ("a b", "there is no token"), ("wrong", "not valid")]
)
def test_a_token_that_is_none_is_told(grafana: FakeGrafana, token: str, said: str) -> None:
    done = push(grafana, token=token)
    assert done.exit_code == 1 and said in done.output
    assert grafana.writes == []


def test_a_token_without_the_right_is_told(grafana: FakeGrafana) -> None:
    grafana.forbidden = True
    done = push(grafana)
    assert done.exit_code == 1 and "may not do that" in done.output


def test_nobody_at_the_address_is_told() -> None:
    pytest.importorskip("grafana_client", reason="grafana-client is not installed")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        done = run("push", "--grafana", f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert done.exit_code == 1 and "nobody answers" in done.output
    done = run("push", "--grafana", "grafana.example")
    assert done.exit_code == 1 and "no address of a Grafana" in done.output


@pytest.mark.parametrize("objective", ["0", "1", "1.5"])
def test_an_objective_is_a_share(objective: str, tmp_path: Path) -> None:
    done = run("export", str(tmp_path), "--objective", objective)
    assert done.exit_code == 1 and "above 0 and below 1" in done.output
