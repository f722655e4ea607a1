"""`ellm models`, through HTTP, to a keeper over a cluster that is played."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from ray.exceptions import RayTaskError
from starlette.applications import Starlette
from typer.testing import CliRunner, Result

import cluster.models_api
from cluster.cli import app
from cluster.config import ClusterConfig
from cluster.model_keeper import ModelKeeper
from cluster.model_set import ModelPhase, ModelSet
from cluster.models_api import model_routes
from cluster.sizing import GIB, MIB
from tests.unit.cluster.fake_fleet import FakeFleet
from tests.unit.cluster.model_examples import entry


class PlayedRegistry:
    """The registry's handle: calls the keeper, and raises what it raises as Ray does."""

    def __init__(self, keeper: ModelKeeper) -> None:
        self._keeper = keeper

    def __getattr__(self, method: str) -> Any:
        async def call(*args: Any) -> Any:
            try:
                return getattr(self._keeper, method)(*args)
            except Exception as error:
                raise RayTaskError(method, "Traceback", error) from error

        return SimpleNamespace(remote=call)


class Cluster:
    """A server of the routes, whose keeper ticks every few milliseconds."""

    def __init__(self, keeper: ModelKeeper, fleet: FakeFleet) -> None:
        self.keeper, self.fleet = keeper, fleet
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        port = int(self.url.rpartition(":")[2])
        self._server = uvicorn.Server(uvicorn.Config(Starlette(routes=[*model_routes()]), port=port, log_level="error"))
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(),))

    def __enter__(self) -> "Cluster":
        self._thread.start()
        deadline_s = time.monotonic() + 20
        while not self._server.started:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    async def _run(self) -> None:
        async def ticks() -> None:
            while True:
                await self.keeper.tick()
                await asyncio.sleep(0.005)

        ticking = asyncio.ensure_future(ticks())
        await self._server.serve()
        ticking.cancel()

    def ellm(self, *arguments: str) -> tuple[int, str]:
        """Exit status and everything printed of ``ellm models``."""
        result = self._invoke(*arguments)
        return result.exit_code, result.output

    def as_json(self, *arguments: str) -> Any:
        """What ``ellm models`` prints on standard output for programs."""
        return json.loads(self._invoke(*arguments, "--json").stdout)

    def _invoke(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, ["models", *arguments, "--url", self.url], env={"COLUMNS": "200"})


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster that serves a and b."""
    fleet = FakeFleet()
    models = ModelSet((entry("a", ModelPhase.ADMITTED), entry("b", ModelPhase.ADMITTED, replicas=1)), GIB)
    fleet.keeper = ModelKeeper(tmp_path / "models.json", models, ClusterConfig(), fleet)
    monkeypatch.setattr(cluster.models_api, "registry_actor", lambda: PlayedRegistry(fleet.keeper))  # type: ignore[arg-type]
    monkeypatch.setattr("cluster.models_command._POLL_S", 0.01)
    with Cluster(fleet.keeper, fleet) as cluster_:
        deadline_s = time.monotonic() + 20
        while fleet.keeper.under_way:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        yield cluster_


def test_the_models_are_listed(running: Cluster) -> None:
    """One row each: phase, replicas, guarantee, ceiling, held bytes, requests."""
    code, text = running.ellm("list")
    assert code == 0
    rows = [line.split() for line in text.splitlines() if line.split()[:1] in (["a"], ["b"])]
    assert rows == [
        ["a", "serving", "2", "64.0Mi", "1.00Gi", "10B", "14B", "2", "4"],
        ["b", "serving", "1", "64.0Mi", "1.00Gi", "5B", "7B", "1", "2"],
    ]


def test_a_folder_is_added_and_removed(running: Cluster, checkpoint: Callable[..., Path]) -> None:
    """Each stage of the addition is printed; afterwards the model is there, or not."""
    folder = checkpoint()
    code, text = running.ellm("add", str(folder), "--replicas", "1", "--ceiling", "512MiB", "--guarantee", "100MiB")
    assert (code, "tiny answers at" in text) == (0, True)
    assert [stage for stage in ("  model ", "  memory ", "  ready ") if stage not in text] == []
    added = running.keeper.models.get("tiny")
    assert (added.config.replicas, added.limits_now.guarantee_bytes) == (1, 100 * MIB)
    code, text = running.ellm("remove", "tiny")
    assert (code, "tiny is removed" in text) == (0, True)
    assert "tiny" not in running.keeper.models.names


def test_what_has_come_and_gone_is_told_to_programs(running: Cluster, checkpoint: Callable[..., Path]) -> None:
    """With --json standard output is the model as it serves, or the name of the one that has gone."""
    [added] = running.as_json("add", str(checkpoint()), "--replicas", "1")
    assert (added["name"], added["phase"]) == ("tiny", "serving")
    assert [one["name"] for one in running.as_json("list")] == ["a", "b", "tiny"]
    assert running.as_json("remove", "tiny") == {"removed": "tiny"}


def test_a_section_of_a_file_is_added(running: Cluster, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Of several models the one that --name says; a single one under the name that is given. Options override it."""
    folder, file = checkpoint(), tmp_path / "models.yaml"
    file.write_text(f"models: [{{name: x, source: {folder}, weight: 3}}, {{name: y, source: {folder}}}]")
    code, text = running.ellm("add", "--config", str(file))
    assert (code, "say which one with --name: x, y" in text) == (1, True)
    assert running.ellm("add", "-c", str(file), "--name", "x", "--replicas", "3")[0] == 0
    added = running.keeper.models.get("x").config
    assert (added.weight, added.replicas) == (3, 3)
    file.write_text(f"models: [{{name: x, source: {folder}, replicas: 1}}]")
    assert running.ellm("add", "-c", str(file), "--name", "z")[0] == 0
    assert running.keeper.models.get("z").config.replicas == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["add", "FOLDER", "--name", "a"], "'a' is there already (serving)"),
        (["add", "/no/such/folder"], "model: no such folder: /no/such/folder"),
        (["add", "FOLDER", "--replicas", "0"], "models[0].replicas: found 0"),
        (["add", "FOLDER", "--ceiling", "much"], "models[0].kv_ceiling: found 'much'"),
        (["add", "FOLDER", "--ceiling", "9GiB"], "memory: model tiny: kv_ceiling is 9216MiB, more than the budget"),
        (["add", "FOLDER", "--guarantee", "1KiB"], "memory: model tiny: guarantee is 1MiB, but one longest request"),
        (["add", "FOLDER", "--replicas", "31"], "29 more fit, 31 were asked for"),
        (["add"], "either MODEL, a folder or a hub id, or --config"),
        (["remove", "c"], "no model 'c' in this cluster; its models are: a, b"),
        (["limit", "c", "--ceiling", "1GiB"], "no model 'c' in this cluster; its models are: a, b"),
        (["limit", "a"], "give --guarantee or --ceiling"),
        (["limit", "a", "--ceiling", "3 apples"], 'ceiling: should be a size such as "512MiB"'),
        (["limit", "a", "--ceiling", "9GiB"], "at most 1024MiB fit"),
        (["limit", "a", "--ceiling", "1MiB"], "above its ceiling of 1MiB"),
        (["limit", "a", "--guarantee", "1MiB"], "at least 64MiB fit"),
        (["limit", "a", "--guarantee", "900MiB"], "at most 480MiB fit"),
    ],
)
def test_what_cannot_work_is_refused(
    running: Cluster, checkpoint: Callable[..., Path], arguments: list[str], said: str
) -> None:
    """The exit status is 1, the message says what would work, and nothing has changed."""
    before = running.keeper.models
    folder = str(checkpoint())
    code, text = running.ellm(*(folder if argument == "FOLDER" else argument for argument in arguments))
    assert (code, said in text.replace("\n", " ")) == (1, True), text
    assert "Traceback" not in text
    assert running.keeper.models == before


def test_limits_change_at_once(running: Cluster) -> None:
    """The new limits are printed; a size that is left out stays, and auto undoes a change."""
    code, text = running.ellm("limit", "a", "--ceiling", "256MiB")
    assert (code, "256Mi" in text) == (0, True)
    code, text = running.ellm("limit", "a", "--ceiling", "256MiB", "--json")
    assert (code, [one["ceiling_bytes"] for one in json.loads(text)]) == (0, [256 * MIB])
    code, text = running.ellm("list", "--json")
    assert (code, [one["name"] for one in json.loads(text)]) == (0, ["a", "b"])
    assert running.ellm("limit", "a", "--guarantee", "100MiB")[0] == 0
    limits = running.keeper.models.get("a").limits_now
    assert (limits.guarantee_bytes, limits.ceiling_bytes) == (100 * MIB, 256 * MIB)
    assert running.ellm("limit", "a", "--ceiling", "auto")[0] == 0
    assert running.keeper.models.get("a").limits_now.ceiling_bytes == GIB


def test_the_last_model_stays(running: Cluster) -> None:
    """The remaining model cannot be removed; the message says what to do instead."""
    assert running.ellm("remove", "a")[0] == 0
    code, text = running.ellm("remove", "b")
    assert (code, "add another one first with `ellm models add`" in text) == (1, True)


def test_names_with_slashes_work(running: Cluster, checkpoint: Callable[..., Path]) -> None:
    """A hub id as a name can be added, shown and removed."""
    assert running.ellm("add", str(checkpoint()), "--name", "owner/model 1%", "--replicas", "1")[0] == 0
    assert running.ellm("limit", "owner/model 1%", "--ceiling", "512MiB")[0] == 0
    assert running.ellm("remove", "owner/model 1%")[0] == 0


def test_without_a_cluster_the_remedy_is_said() -> None:
    """Nothing listens, or something else does."""
    result = CliRunner().invoke(app, ["models", "list", "--url", "http://127.0.0.1:9"])
    assert (result.exit_code, "start one with `ellm serve`" in result.output) == (1, True)


def test_a_body_of_another_kind_is_refused(running: Cluster) -> None:
    """What a web page of another origin can send without asking (text), what is no JSON, and unknown keys: 400."""
    url = f"{running.url}/ellm/models"
    answers = [
        httpx.post(url, content=b"{}", headers={"content-type": "text/plain"}),
        httpx.post(url, content=b"{", headers={"content-type": "application/json"}),
        httpx.post(url, json={"nam": "c"}),
        httpx.patch(f"{url}/a", json={}),
        httpx.patch(f"{url}/a", json={"limit": 3}),
    ]
    assert [answer.status_code for answer in answers] == [400] * 5
    said = ("application/json", "not JSON", "nam: ", "nothing to change", "limit: ")
    for answer, words in zip(answers, said, strict=True):
        assert words in answer.json()["error"]["message"]


def test_a_registry_that_is_away_is_503(running: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says to try again; models are served meanwhile."""

    def away() -> Any:
        raise ValueError("no such actor")

    monkeypatch.setattr(cluster.models_api, "registry_actor", away)
    code, text = running.ellm("list")
    assert (code, "try again soon" in text) == (1, True)
