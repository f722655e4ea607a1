"""``--json`` of the commands: every one has it, and then standard output is JSON alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import cluster.cli
import cluster.launcher
from cluster.cli import app
from cluster.config import ClusterConfig
from cluster.launch_error import LaunchError


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command below, by what is typed."""
    if below := getattr(command, "commands", None):
        for name, one in below.items():
            yield from commands(one, (*path, name))
    else:
        yield " ".join(path), command


def printed(*arguments: str) -> Any:
    """Standard output of a command, read as JSON."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_every_command_has_json() -> None:
    """None is without it."""
    found = dict(commands(get_command(app)))
    assert "models add" in found
    assert [name for name, one in found.items() if "--json" not in {opt for p in one.params for opt in p.opts}] == []


def test_the_example_is_every_default() -> None:
    """Without comments, and it can be read back."""
    assert ClusterConfig.model_validate_json(json.dumps(printed("config", "example", "--json"))) == ClusterConfig()


def test_the_default_model_is_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done for it goes to standard error."""

    def made(progress: Any) -> Path:
        progress("converting")
        return Path("/models/one")

    monkeypatch.setattr(cluster.cli, "get_default_model", made)
    assert printed("model", "get", "--json") == {"folder": "/models/one"}
    assert CliRunner().invoke(app, ["model", "get"]).stdout == "/models/one\n"


def test_a_revoked_key_is_named(tmp_path: Path) -> None:
    """By its id."""
    file = str(tmp_path / "keys.yaml")
    key = printed("keys", "create", "--tenant", "a", "--file", file, "--json")
    assert printed("keys", "revoke", key["id"], "--file", file, "--json") == {"revoked": key["id"]}


class PlayedCluster:
    """A cluster that starts, or fails to, at once."""

    error: LaunchError | None = None

    def __init__(self, config: ClusterConfig, report: Any) -> None:
        self.url = f"http://127.0.0.1:{config.http.port}"
        self._report = report

    def start(self) -> None:
        self._report("check", 0.0, "fits")
        if self.error is not None:
            raise self.error

    def wait(self) -> None:
        raise KeyboardInterrupt

    def stop(self) -> None:
        self._report("stop", 0.0, "nothing is left")


def test_a_program_learns_where_a_cluster_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line when it serves; the stages go to standard error. One that does not start prints none."""
    monkeypatch.setattr(cluster.launcher, "LocalCluster", PlayedCluster)
    monkeypatch.setattr(cluster.cli, "_interrupt_on_signals", lambda cluster: None)
    monkeypatch.setattr(cluster.cli.os, "_exit", exit_with)
    file = tmp_path / "cluster.yaml"
    file.write_text("models: [{name: a}, {name: b}]\nhttp: {port: 8123}")
    url = "http://127.0.0.1:8123"
    assert printed("serve", "--config", str(file), "--json") == {"url": url, "api": f"{url}/v1", "models": ["a", "b"]}
    assert "from openai import OpenAI" in CliRunner().invoke(app, ["serve", "--config", str(file)]).stdout
    monkeypatch.setattr(PlayedCluster, "error", LaunchError("ray", "it did not start"))
    failed = CliRunner().invoke(app, ["serve", "--config", str(file), "--json"])
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert "error: ray: it did not start" in failed.stderr


def exit_with(code: int) -> None:
    raise SystemExit(code)
