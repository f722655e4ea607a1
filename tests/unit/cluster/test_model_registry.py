"""The registry's view and its long poll, an ingress that follows it, and what is read out of Serve's status."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

import cluster.model_registry
import cluster.registry_link
from cluster.app import model_app_name
from cluster.config import ClusterConfig
from cluster.model_registry import ModelRegistry, ModelsView, RegistrySpec
from cluster.model_set import ModelPhase, ModelSet
from cluster.registry_link import RegistryFollower
from cluster.serve_fleet import app_state
from cluster.sizing import GIB
from tests.unit.cluster.fake_fleet import FakeFleet
from tests.unit.cluster.model_examples import entry

SPEC = RegistrySpec("test", "cpu", ClusterConfig())
MODELS = ModelSet((entry("a", ModelPhase.ADMITTED), entry("b", ModelPhase.ADMITTED)), GIB)

Start = Callable[[], Awaitable[ModelRegistry]]


@pytest.fixture
async def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    """Starts the registry as Ray does, again and again on the same file and the same played cluster."""
    fleet = FakeFleet()
    started: list[ModelRegistry] = []
    monkeypatch.setattr(RegistrySpec, "path", tmp_path / "models.json")
    monkeypatch.setattr(cluster.model_registry, "ServeFleet", lambda *where: fleet)
    monkeypatch.setattr(cluster.model_registry, "_BUSY_TICK_S", 0.005)

    async def begin() -> ModelRegistry:
        registry = ModelRegistry.__new__(ModelRegistry)
        await ModelRegistry.__init__(registry, SPEC, MODELS)  # what Ray does with an actor's coroutine constructor
        fleet.keeper = registry._keeper
        started.append(registry)
        return registry

    yield begin
    for registry in started:
        registry._task.cancel()
    await asyncio.gather(*(registry._task for registry in started), return_exceptions=True)


def names(view: ModelsView) -> list[str]:
    return [model.spec.model_name for model in view.models]


async def serving(registry: ModelRegistry, *wanted: str) -> ModelsView:
    """The view in which exactly these models serve."""
    view = await registry.watch(0, 0.0)
    async with asyncio.timeout(10):
        while view.serving != set(wanted):
            view = await registry.watch(view.revision, 1.0)
    return view


async def test_a_watcher_sees_each_change(start: Start) -> None:
    """The view comes at once to who has seen less, and to the others with the next change: here, a removal."""
    registry = await start()
    view = await serving(registry, "a", "b")
    assert names(view) == ["a", "b"]
    waiting = asyncio.ensure_future(registry.watch(view.revision, 20.0))
    done, _ = await asyncio.wait([waiting], timeout=0.05)
    assert not done, "nothing has changed"
    await registry.remove("a")
    changed = await asyncio.wait_for(waiting, 5.0)
    assert (names(changed), changed.serving) == (["b"], {"b"})
    assert changed.revision != view.revision
    again = await asyncio.wait_for(registry.watch(changed.revision, 0.02), 5.0)
    assert again == changed, "nothing has changed within the timeout"


async def test_a_model_is_shown_when_serve_has_it(start: Start) -> None:
    """An ingress asks Serve for what it is shown, so what is not deployed yet is not shown."""
    registry = await start()
    first = await registry.watch(0, 0.0)
    assert names(first) == []
    assert names(await serving(registry, "a", "b")) == ["a", "b"]


async def test_a_view_of_a_former_life_is_answered_at_once(start: Start) -> None:
    """A restarted registry goes on from its file, and its views cannot be mistaken for former ones."""
    old = await start()
    view = await serving(old, "a", "b")
    old._task.cancel()
    new = await start()
    seen = await asyncio.wait_for(new.watch(view.revision, 20.0), 5.0)
    assert (names(seen), seen.serving) == (["a", "b"], {"a", "b"})


class Table:
    """Remembers what it is to follow."""

    def __init__(self) -> None:
        self.followed: list[list[str]] = []
        self.twice = asyncio.Event()

    def follow(self, wanted: Any) -> None:
        self.followed.append(list(wanted))
        if len(self.followed) == 2:
            self.twice.set()


async def test_a_follower_keeps_its_models_while_the_registry_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that fails and an actor that is not there change nothing; the next view counts whatever its revision."""
    asked: list[int] = []
    answers: list[Any] = [
        ModelsView(5, ("a",), frozenset({"a"})),  # type: ignore[arg-type]
        ActorDiedError(),
        ModelsView(5, ("b",), frozenset()),  # type: ignore[arg-type]
    ]

    async def watch(revision: int, timeout_s: float) -> ModelsView:
        asked.append(revision)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    actors: list[Any] = [ValueError("no such actor")]

    def actor() -> Any:
        if actors:
            raise actors.pop()
        return SimpleNamespace(watch=SimpleNamespace(remote=watch))

    monkeypatch.setattr(cluster.registry_link, "registry_actor", actor)
    monkeypatch.setattr(cluster.registry_link, "RETRY_PERIOD_S", 0.0)
    table: Any = Table()
    follower = RegistryFollower(table)
    assert await follower.first() == ["a"]
    following = asyncio.ensure_future(follower.run())
    await asyncio.wait_for(table.twice.wait(), 5.0)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert table.followed == [["a"], ["b"]]
    assert asked[:3] == [0, 5, 0]


def test_what_serve_says_of_an_application() -> None:
    """Replicas are counted; the reason of a failed start is its root."""
    deployment = SimpleNamespace(
        replica_states={"RUNNING": 1, "STARTING": 2}, status="UPDATING", message="ValueError: no such folder"
    )
    app: Any = SimpleNamespace(status="DEPLOYING", message="", deployments={"engine": deployment})
    state = app_state(app)
    assert (state.running, state.deleting, state.failed) == (False, False, None)
    assert state.progress == "1 of 3 replicas are up"
    app.status = "DEPLOY_FAILED"
    assert app_state(app).failed == "ValueError: no such folder"
    app.status = "RUNNING"
    assert app_state(app).running


def test_an_application_is_named_for_its_model() -> None:
    """Two models never share an application, whatever characters their names have."""
    models = ["a/b", "a--b", "a%2Fb", "a b"]
    assert len({model_app_name(name) for name in models}) == len(models)
    assert all("/" not in model_app_name(name) for name in models)
