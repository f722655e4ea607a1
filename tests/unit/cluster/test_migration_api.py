"""``ellm migrate`` and its route, over a core that is played."""

import json
from http import HTTPStatus
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from typer.testing import CliRunner

import cluster.models_client
from cluster.cli import app
from cluster.ingress_peers import IngressPeers
from cluster.migration import MigrationError
from cluster.migration_api import MoveAnswer, migration_routes
from cluster.move import Migrated


class PlayedCore:
    """Runs request "r" at "a"."""

    @property
    def mover(self) -> "PlayedCore":
        return self

    def has(self, request_id: str) -> bool:
        return request_id == "r"

    async def migrate(self, request_id: str, to: str) -> Migrated:
        if to == "c":
            raise MigrationError("m has no replica c; it has a, b", HTTPStatus.NOT_FOUND)
        if to == "a":
            raise MigrationError("request r is at a already")
        return Migrated(request_id, "a", to, 7, 2, 0.25)


class Others(IngressPeers):
    """One more process, which runs request "e"; this one answers too, that it has it not."""

    async def ask(self, method: str, *args: Any, timeout_s: float = 0.0) -> list[Any]:
        assert method == "migrate" and timeout_s > 30
        request_id, to = args
        if request_id == "gone":
            return []  # nobody answers in time
        if to == "c":
            return [None, MoveAnswer(None, "m has no replica c", HTTPStatus.NOT_FOUND)]
        return [None, MoveAnswer(Migrated("e", "a", to, 1, 1, None)) if request_id == "e" else None]


def api() -> Starlette:
    return Starlette(routes=migration_routes(lambda: [PlayedCore()], Others(2)))  # type: ignore[list-item]


async def ask(**request: Any) -> tuple[int, dict[str, Any]]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api()), base_url="http://api") as http:
        answer = await http.post("/ellm/migrate", **request)
        return answer.status_code, answer.json()


async def test_a_request_is_moved() -> None:
    moved = {"request_id": "r", "source": "a", "destination": "b", "blocks_ahead": 7, "rounds": 2, "downtime_s": 0.25}
    assert await ask(json={"request_id": "r", "to": "b"}) == (200, moved)


async def test_a_request_of_another_process_is_moved_by_that() -> None:
    status, moved = await ask(json={"request_id": "e", "to": "b"})
    assert (status, moved["request_id"], moved["destination"]) == (200, "e", "b")


@pytest.mark.parametrize(
    ("request_id", "to", "status", "why"),
    [
        ("x", "b", 404, "no request x runs here"),
        ("gone", "b", 404, "no request gone runs here"),
        ("e", "c", 404, "m has no replica c"),
        ("r", "c", 404, "it has a, b"),
        ("r", "a", 409, "is at a already"),
    ],
)
async def test_what_cannot_be_moved_says_why(request_id: str, to: str, status: int, why: str) -> None:
    code, answer = await ask(json={"request_id": request_id, "to": to})
    assert code == status
    assert why in answer["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"request_id": "r"}', b'{"request_id": 1, "to": "b"}', b'{"x": 1}'],
)
async def test_a_wrong_body_is_told_the_right_one(body: bytes) -> None:
    code, answer = await ask(content=body, headers={"content-type": "application/json"})
    assert code == 400
    assert '{"request_id": ID, "to": REPLICA}' in answer["error"]["message"]


async def test_a_form_is_refused() -> None:
    code, answer = await ask(content=b'{"request_id": "r", "to": "b"}', headers={"content-type": "text/plain"})
    assert code == 400
    assert "application/json" in answer["error"]["message"]


def play(monkeypatch: pytest.MonkeyPatch, answer: httpx.Response | httpx.HTTPError) -> None:
    """The cluster's answer to the command line."""

    def respond(request: httpx.Request) -> httpx.Response:
        assert (request.method, str(request.url)) == ("POST", "http://127.0.0.1:8000/ellm/migrate")
        assert json.loads(request.content) == {"request_id": "r", "to": "b"}
        if isinstance(answer, httpx.HTTPError):
            raise answer
        return answer

    transport = httpx.MockTransport(respond)
    monkeypatch.setattr(cluster.models_client, "api_client", lambda timeout_s: httpx.Client(transport=transport))


def test_the_command_tells_what_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"request_id": "r", "source": "a", "destination": "b", "blocks_ahead": 7, "rounds": 2, "downtime_s": 0.25}
    play(monkeypatch, httpx.Response(200, json=content))
    result = CliRunner().invoke(app, ["migrate", "r", "b"])
    assert result.exit_code == 0
    assert "r has moved from a to b: 7 KV blocks went ahead in 2 rounds" in result.output
    assert json.loads(CliRunner().invoke(app, ["migrate", "r", "b", "--json"]).stdout) == content


def test_the_command_tells_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, httpx.Response(409, json={"error": {"message": "request r is at b already"}}))
    result = CliRunner().invoke(app, ["migrate", "r", "b"])
    assert result.exit_code == 1
    assert "request r is at b already" in result.output


def test_the_command_says_that_no_cluster_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, httpx.ConnectError("refused"))
    result = CliRunner().invoke(app, ["migrate", "r", "b"])
    assert result.exit_code == 1
    assert "127.0.0.1:8000" in result.output
