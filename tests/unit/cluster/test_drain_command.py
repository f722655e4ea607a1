"""``ellm drain`` and its routes, over cores that are played."""

import json
from collections.abc import Collection, Iterator
from http import HTTPStatus
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from typer.testing import CliRunner

import cluster.drain_command
import cluster.models_client
from cluster.cli import app
from cluster.drain_api import drain_routes
from cluster.migration import MigrationError
from replicas.replica import ReplicaStats
from tests.unit.cluster.fake_replicas import stats

JSON = {"content-type": "application/json"}


class PlayedCore:
    """Of model "m", with these replicas."""

    model = "m"

    def __init__(self, *replicas: ReplicaStats) -> None:
        self.replicas = list(replicas)
        self.told: list[tuple[list[str], bool]] = []

    def check_drain(self, replicas: Collection[str]) -> None:
        if len(replicas) == len(self.replicas):
            raise MigrationError("no other replica of m would take requests")

    async def drain(self, replicas: Collection[str], on: bool) -> None:
        if "ellm#m#mute" in replicas:
            raise MigrationError("ellm#m#mute did not answer", HTTPStatus.SERVICE_UNAVAILABLE)
        self.told.append((sorted(replicas), on))

    def stays_at(self, replica: str) -> dict[str, str]:
        return {"r": "a penalty over the answer"} if replica == "ellm#m#b" else {}


@pytest.fixture
def core() -> PlayedCore:
    return PlayedCore(stats("ellm#m#a"), stats("ellm#m#b", running=2, draining=True), stats("ellm#m#mute"))


async def ask(core: PlayedCore, method: str, path: str, **request: Any) -> tuple[int, dict[str, Any]]:
    other = PlayedCore(stats("ellm#n#c"), stats("ellm#n#d"))
    api = Starlette(routes=drain_routes(lambda: [core, other]))  # type: ignore[list-item]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://api") as http:
        answer = await http.request(method, path, **request)
        return answer.status_code, answer.json()


@pytest.mark.parametrize("target", ["ellm#m#a", "a", "node-of-ellm#m#a"])
async def test_a_replica_has_several_names(core: PlayedCore, target: str) -> None:
    assert await ask(core, "POST", "/ellm/drain", json={"target": target}) == (202, {"replicas": ["ellm#m#a"]})
    assert await ask(core, "POST", "/ellm/drain", json={"target": target, "undo": True}) == (
        202,
        {"replicas": ["ellm#m#a"]},
    )
    assert core.told == [(["ellm#m#a"], True), (["ellm#m#a"], False)]


@pytest.mark.parametrize(
    ("target", "status", "why"),
    [
        ("x", 404, "no replica and no node is named x; there are 10.0.0.1, ellm#m#a"),
        ("node", 404, "no replica and no node is named node"),
        ("10.0.0.1", 409, "no other replica of m would take requests"),
        ("mute", 503, "did not answer"),
    ],
)
async def test_what_cannot_drain_says_why(core: PlayedCore, target: str, status: int, why: str) -> None:
    """A node that has all replicas of a model is one of them, and then nothing drains."""
    code, answer = await ask(core, "POST", "/ellm/drain", json={"target": target})
    assert (code, core.told) == (status, [])
    assert why in answer["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"target": 1}', b'{"target": "a", "undo": "yes"}'])
async def test_a_wrong_body_is_told_the_right_one(core: PlayedCore, body: bytes) -> None:
    code, answer = await ask(core, "POST", "/ellm/drain", content=body, headers=JSON)
    assert code == 400
    assert '{"target": REPLICA or NODE}' in answer["error"]["message"]


async def test_a_form_is_refused(core: PlayedCore) -> None:
    code, answer = await ask(core, "POST", "/ellm/drain", content=b"{}", headers={"content-type": "text/plain"})
    assert code == 400
    assert "application/json" in answer["error"]["message"]


async def test_what_drains_is_listed(core: PlayedCore) -> None:
    code, answer = await ask(core, "GET", "/ellm/drains")
    assert code == 200
    assert answer["drains"] == [
        {
            "replica": "ellm#m#b",
            "model": "m",
            "node_id": "node-of-ellm#m#b",
            "node_ip": "10.0.0.1",
            "streams": 2,
            "stays": {"r": "a penalty over the answer"},
        }
    ]


class Cluster:
    """Answers the command line; ``left``: requests at "ellm#m#b", one look after the other, the last one for ever."""

    def __init__(self, *left: int | None) -> None:
        self.left = list(left)
        self.asked: list[Any] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            self.asked.append(json.loads(request.content))
            return httpx.Response(202, json={"replicas": ["ellm#m#b"]})
        streams = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        one = {"replica": "ellm#m#b", "model": "m", "streams": streams, "stays": {"r": "a seed"} if streams else {}}
        return httpx.Response(200, json={"drains": [] if streams is None else [one]})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cluster.drain_command, "_LOOK_S", 0.0)
    yield


def run(monkeypatch: pytest.MonkeyPatch, cluster_: Cluster, *words: str) -> Any:
    def client(timeout_s: float) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(cluster_))

    monkeypatch.setattr(cluster.models_client, "api_client", client)
    return CliRunner().invoke(app, ["drain", *words])


def test_it_waits_until_the_replica_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before the replica has said that it drains."""
    result = run(monkeypatch, Cluster(None, None, 2, 1, 1, 0), "b")
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "b of m: 2 left",
        "  r stays to its end: a seed",
        "b of m: 1 left",
        "  r stays to its end: a seed",
        "b: empty, and gets no request until `ellm drain b --undo`",
    ]


def test_it_gives_up_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, Cluster(3), "b", "--timeout", "0", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["left"][0]["streams"] == 3
    assert "not empty after 0 s; the drain goes on" in result.stderr


def test_it_need_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Cluster(3)
    assert "is being emptied" in run(monkeypatch, played, "b", "--no-wait").output
    assert "may have requests again" in run(monkeypatch, played, "b", "--undo").output
    assert played.asked == [{"target": "b", "undo": False}, {"target": "b", "undo": True}]


def test_a_refusal_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        return httpx.Response(409, json={"error": {"message": "no other replica of m would take requests"}})

    result = run(monkeypatch, refuse, "b")  # type: ignore[arg-type]
    assert result.exit_code == 1
    assert "no other replica of m would take requests" in result.output
