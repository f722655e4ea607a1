"""What `ellm explain` shows, from a controller's decisions to the terminal."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from rich.console import Console
from starlette.applications import Starlette
from typer.testing import CliRunner

from cluster import cluster_status, decisions_api
from cluster.cli import app
from cluster.cluster_status import ControllerAwayError
from cluster.controller import Controller
from cluster.decision import Decision
from cluster.decisions_api import decision_routes
from cluster.explain import render_decisions
from cluster.target_planner import TargetSettings
from tests.unit.cluster.test_cli import answering
from tests.unit.cluster.test_controller import engine, report


async def made() -> list[dict[str, Any]]:
    """The decisions of a controller that got a report and was told of one more."""
    controller = Controller.__new__(Controller)
    await Controller.__init__(controller, TargetSettings(tpot_s=0.1))  # what Ray does with a coroutine constructor
    await controller.report_device(report(1, engine("app#engine#abc")))
    await controller.record(Decision("scale", "m", "3 replicas", "2.4 replicas' worth of work", {"busy": 2.4}))
    assert await controller.decisions(5, "no such replica") == []
    assert [one["kind"] for one in await controller.decisions(1)] == ["scale"]
    return await controller.decisions(20)


def text(decisions: list[dict[str, Any]]) -> str:
    console = Console(width=200, record=True)
    console.print(render_decisions(decisions))
    return console.export_text()


def test_decisions_are_told_with_reason_and_inputs() -> None:
    """The newest last: what was decided about whom, why, and what was seen."""
    shown = text(asyncio.run(made()))
    lines = [line.strip() for line in shown.splitlines()]
    assert lines[0].endswith("target abc: 881 tokens a step, 32 requests")
    assert lines[1] == "because steps of 100 ms keep 100 ms a token"
    assert lines[2].startswith("saw running 2, waiting 3,")
    assert lines[3].endswith("ago  scale m: 3 replicas")
    assert lines[4:] == ["because 2.4 replicas' worth of work", "saw busy 2.4"]


def test_nothing_decided_is_said() -> None:
    """An empty answer is no empty screen."""
    assert "decided nothing" in text([])


def test_the_command_prints_both_ways() -> None:
    """As text and as JSON, of whatever stands at the address; an address without a cluster is an error."""
    decisions = asyncio.run(made())
    with answering(200, json.dumps(decisions)) as url:
        plain = CliRunner().invoke(app, ["explain", "--url", url])
        as_json = CliRunner().invoke(app, ["explain", "abc", "--last", "2", "--json", "--url", url])
    assert "881 tokens a step" in plain.output
    assert json.loads(as_json.output) == decisions
    refused = CliRunner().invoke(app, ["explain", "--last", "0"])
    assert refused.exit_code == 2
    with answering(404, "not found") as url:
        other = CliRunner().invoke(app, ["explain", "--url", url])
    assert other.exit_code == 1 and "not as an ellm cluster" in other.output


async def test_the_route_passes_the_question_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many and about whom reach the controller; a number that is none is refused with what would do."""
    asked: list[tuple[int, str]] = []

    async def read(count: int, subject: str) -> list[dict[str, Any]]:
        asked.append((count, subject))
        return [{"kind": "target"}]

    monkeypatch.setattr(decisions_api, "read_decisions", read)
    transport = httpx.ASGITransport(app=Starlette(routes=decision_routes()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as api:
        assert (await api.get("/ellm/decisions")).json() == [{"kind": "target"}]
        await api.get("/ellm/decisions", params={"last": "7", "subject": "abc"})
        for wrong in ("0", "-1", "x", "1001", "²"):
            answer = await api.get("/ellm/decisions", params={"last": wrong})
            assert answer.status_code == 400 and "from 1 to 1000" in answer.json()["error"]["message"]
    assert asked == [(20, ""), (7, "abc")]


async def test_a_controller_that_is_away_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason."""

    async def away(method: str, *args: object) -> None:
        raise ControllerAwayError("the cluster's controller is not running")

    monkeypatch.setattr(cluster_status, "_ask", away)
    transport = httpx.ASGITransport(app=Starlette(routes=decision_routes()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as api:
        answer = await api.get("/ellm/decisions")
    assert answer.status_code == 503 and "not running" in answer.json()["error"]["message"]
