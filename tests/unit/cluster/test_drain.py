"""Letting a node go: it waits for what is there, no longer than it may, and asks Ray in words that Ray understands."""

import itertools
import socket
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from ray.scripts.scripts import drain_node
from ray.util.state.exception import ServerUnavailable

import cluster.deploy.drain
from cluster.deploy.drain import NodeEngines, connections_at, drain, main, mark_node


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.deploy.drain, "_POLL_S", 0.0)


def test_it_waits_until_nothing_is_left() -> None:
    """The node is marked first."""
    seen: list[str] = []
    left = iter(["2 requests", "1 requests", ""])
    assert drain(lambda: seen.append("mark"), lambda: seen.append("look") or next(left), 10.0, lambda: 0.0) == ""
    assert seen == ["mark", "look", "look", "look"]


def test_it_gives_up_when_its_time_is_over() -> None:
    """And says what is left."""
    clock = itertools.count()
    assert drain(lambda: None, lambda: "1 requests", 5.0, lambda: float(next(clock))) == "1 requests"
    assert next(clock) == 6


def test_ray_knows_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option and the reason are ones that this Ray's drain-node has."""
    asked: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        asked.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(cluster.deploy.drain.subprocess, "run", run)
    mark_node("ab" * 28, 60)
    (command,) = asked
    given = command[command.index("drain-node") + 1 :]
    assert drain_node.make_context("drain-node", given).params["deadline_remaining_seconds"] == 60
    assert CliRunner().invoke(drain_node, [*given[:-1], "soon"]).exit_code == 2


def test_engines_of_this_node_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """And neither the API's processes nor other actors."""
    names = [
        "ServeReplica:ellm-model:a:engine",
        "ServeReplica:ellm:api",
        "MemoryAgent",
        "ServeReplica:ellm-model:b:engine",
    ]
    asked: list[Any] = []

    def list_actors(filters: Any, limit: int) -> list[Any]:
        asked.extend(filters)
        return [SimpleNamespace(class_name=name) for name in names]

    monkeypatch.setattr("ray.util.state.list_actors", list_actors)
    engines = NodeEngines("n1", lambda: 0.0)
    assert engines.left() == "2 engine replicas"
    assert ("node_id", "=", "n1") in asked and ("state", "=", "ALIVE") in asked
    names.clear()
    assert engines.left() == ""


def test_a_head_that_does_not_tell_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be being replaced, with the engines of this node at work; but not for ever: with the head gone for good
    the pod would stay to its deadline. Each answer begins the wait anew."""
    clock, tells = [0.0], [False]

    def list_actors(filters: Any, limit: int) -> list[Any]:
        if not tells[0]:
            raise ServerUnavailable("gone")
        return [SimpleNamespace(class_name="ServeReplica:ellm-model:a:engine")]

    monkeypatch.setattr("ray.util.state.list_actors", list_actors)
    patience_s = cluster.deploy.drain._HEAD_PATIENCE_S
    engines = NodeEngines("n1", lambda: clock[0])
    seen = []
    for clock[0], tells[0] in ((patience_s - 1, False), (patience_s - 1, True), (patience_s + 1, False), (1e4, False)):
        seen.append(engines.left())
    assert seen == ["engine replicas, maybe", "1 engine replicas", "engine replicas, maybe", ""]


def test_without_ray_the_requests_of_the_api_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is asked of Ray."""

    def init(**options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(cluster.deploy.drain.subprocess, "run", None)
    left = iter(["1 connections", ""])
    monkeypatch.setattr(cluster.deploy.drain, "connections_at", lambda port: next(left))
    assert main(["--within", "60", "--port", "8000"]) == 0
    assert next(left, "none") == "none"


def test_connections_to_the_api_count() -> None:
    """From the first to the last; who only listens is none, nor is a connection to somebody else."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        port = server.getsockname()[1]
        assert connections_at(port) == ""
        with socket.create_connection(server.getsockname()), socket.create_connection(other.getsockname()):
            accepted, _ = server.accept()
            assert connections_at(port) == "1 connections"
        accepted.close()
        assert connections_at(port) == ""
