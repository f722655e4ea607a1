"""The keeper of the models on a cluster that is played: additions, removals, limits, and its own restart."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import ClusterConfig, ModelConfig
from cluster.model_keeper import ModelKeeper
from cluster.model_set import Limits, ModelConflictError, ModelEntry, ModelPhase, ModelSet, UnknownModelError
from cluster.sizing import GIB, MIB
from tests.unit.cluster.fake_fleet import FakeFleet
from tests.unit.cluster.model_examples import LEAST, entry


@pytest.fixture
def fleet() -> FakeFleet:
    return FakeFleet()


@pytest.fixture
def source(checkpoint: Callable[..., Path]) -> str:
    """Folder of a small checkpoint."""
    return str(checkpoint())


@pytest.fixture
def keeper(tmp_path: Path, fleet: FakeFleet) -> ModelKeeper:
    """Keeps the models a and b, which are not deployed yet."""
    initial = ModelSet((entry("a", ModelPhase.ADMITTED), entry("b", ModelPhase.ADMITTED, replicas=1)), GIB)
    fleet.keeper = ModelKeeper(tmp_path / "models.json", initial, ClusterConfig(), fleet)
    return fleet.keeper


async def settle(keeper: ModelKeeper) -> None:
    for _ in range(6):
        await keeper.tick()


async def until(keeper: ModelKeeper, reached: Callable[[], bool]) -> None:
    for _ in range(2000):
        await keeper.tick()
        if reached():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("not reached")


def phases(keeper: ModelKeeper) -> dict[str, str]:
    return {row["name"]: row["phase"] for row in keeper.listing()}


def new(folder: str, **tree: object) -> ModelConfig:
    known = {"name": "c", "source": folder, "replicas": 1}
    return ModelConfig.model_validate(known | tree)


async def test_the_first_models_are_deployed(keeper: ModelKeeper, fleet: FakeFleet) -> None:
    """Each is deployed once, knows how many engines share the host, and serves when its replicas and API are there."""
    fleet.api_follows = False
    await settle(keeper)
    assert fleet.calls == ["deploy a, of 3", "deploy b, of 3"]
    assert phases(keeper) == {"a": "starting", "b": "starting"}
    fleet.api_follows = True
    await settle(keeper)
    assert phases(keeper) == {"a": "serving", "b": "serving"}
    assert len(fleet.calls) == 2


async def test_a_model_is_added(keeper: ModelKeeper, fleet: FakeFleet, source: str) -> None:
    """It is found, sized, deployed and served, and its story tells each stage; the others stay as they are."""
    await settle(keeper)
    keeper.add(new(source))
    assert phases(keeper)["c"] == "sizing"
    await until(keeper, lambda: phases(keeper).get("c") == "serving")
    assert phases(keeper) == {"a": "serving", "b": "serving", "c": "serving"}
    assert fleet.calls[-1] == "deploy c, of 4"
    stages = [stage for stage, _, _ in keeper.story_of("c")["lines"]]
    assert [stage for stage in ("model", "memory", "ready") if stage not in stages] == []
    row = keeper.story_of("c")
    assert (row["held_bytes"], row["running"], row["error"]) == (5, 1, None)


async def test_an_addition_that_cannot_work_is_told_and_forgotten(
    keeper: ModelKeeper, fleet: FakeFleet, source: str
) -> None:
    """No such folder, too little memory, replicas that do not start: the stage and the reason are told, nothing is left
    deployed, and the name can be used again."""
    await settle(keeper)
    keeper.add(new(source, source="/no/such/folder"))
    await until(keeper, lambda: phases(keeper).get("c") == "failed")
    assert keeper.story_of("c")["error"].startswith("model: no such folder: /no/such/folder")
    fleet.free = GIB
    keeper.add(new(source))
    await until(keeper, lambda: phases(keeper).get("c") == "failed")
    assert keeper.story_of("c")["error"].startswith("memory: too little memory for c")
    fleet.free, fleet.failing = 24 * GIB, "vLLM refuses the model"
    keeper.add(new(source))
    await until(keeper, lambda: phases(keeper).get("c") == "failed")
    assert "vLLM refuses the model" in keeper.story_of("c")["error"]
    assert fleet.calls[-1] == "delete c"
    assert "c" not in fleet.running
    fleet.failing = None
    keeper.add(new(source))
    await until(keeper, lambda: phases(keeper).get("c") == "serving")
    assert keeper.story_of("c")["error"] is None


async def test_room_for_weights_follows_the_models(keeper: ModelKeeper, fleet: FakeFleet, source: str) -> None:
    """Those of every replica that is meant to be there are set aside before it is deployed, until it is gone."""
    await settle(keeper)
    assert fleet.weights_bytes == keeper.models.weights_bytes == 3 * 300 * MIB
    keeper.add(new(source, replicas=2))
    await until(keeper, lambda: "c" in keeper.models.names)
    added = 2 * keeper.models.get("c").spec.weights_bytes
    await keeper.tick()
    assert fleet.weights_bytes == 3 * 300 * MIB + added
    assert "deploy c, of 5" in fleet.calls
    keeper.remove("c")
    await settle(keeper)
    assert fleet.weights_bytes == 3 * 300 * MIB


async def test_a_start_that_waits_is_told(keeper: ModelKeeper, fleet: FakeFleet, source: str) -> None:
    """The story of the model says that, and for how much."""
    await settle(keeper)
    fleet.replicas_start = False
    keeper.add(new(source))
    await until(keeper, lambda: phases(keeper).get("c") == "starting")
    fleet.engines["c-0"].state, fleet.engines["c-0"].start_bytes = "STARTING", 30 * MIB
    fleet.engines["c-0"].waits_to_start = True
    await settle(keeper)
    assert keeper.story_of("c")["progress"].endswith("a start waits for 30MiB")


async def test_a_failure_is_forgotten_when_removed(keeper: ModelKeeper, source: str) -> None:
    """What is only remembered can be removed; then it is unknown."""
    await settle(keeper)
    keeper.add(new(source, source="/no/such/folder"))
    await until(keeper, lambda: phases(keeper).get("c") == "failed")
    keeper.remove("c")
    with pytest.raises(UnknownModelError, match="its models are: a, b"):
        keeper.story_of("c")


async def test_an_addition_counts_what_is_on_its_way(keeper: ModelKeeper, fleet: FakeFleet, source: str) -> None:
    """The memory of a model that is still starting is not given to the next one."""
    await settle(keeper)
    fleet.free, fleet.replicas_start = 4 * GIB, False
    keeper.add(new(source))
    await until(keeper, lambda: phases(keeper).get("c") == "starting")
    keeper.add(new(source, name="d"))
    await until(keeper, lambda: phases(keeper).get("d") == "failed")
    assert phases(keeper)["c"] == "starting"
    assert "too little memory for d" in keeper.story_of("d")["error"]


async def test_the_same_addition_again_changes_nothing(keeper: ModelKeeper, source: str) -> None:
    """A command that is run again is one command; another model under the name is refused."""
    await settle(keeper)
    keeper.add(new(source))
    keeper.add(new(source))
    with pytest.raises(ModelConflictError, match="'c' is being added"):
        keeper.add(new(source, replicas=2))
    await until(keeper, lambda: phases(keeper).get("c") == "serving")
    with pytest.raises(ModelConflictError, match=r"'c' is there already \(serving\)"):
        keeper.add(new(source))


async def test_a_removed_model_drains_before_it_leaves(keeper: ModelKeeper, fleet: FakeFleet) -> None:
    """Its replicas stay as long as an ingress has requests of it; then they end, and it is unknown."""
    await settle(keeper)
    fleet.in_flight = {"a": 2}
    keeper.remove("a")
    await settle(keeper)
    assert phases(keeper)["a"] == "draining"
    assert keeper.story_of("a")["lines"][-1][2] == "2 requests in flight"
    assert "a" in fleet.running
    keeper.remove("a")
    fleet.in_flight = {}
    await settle(keeper)
    assert phases(keeper) == {"b": "serving"}
    assert fleet.calls[-1] == "delete a"


async def test_an_addition_can_be_taken_back(keeper: ModelKeeper, fleet: FakeFleet, source: str) -> None:
    """While it is being sized, and while its replicas start."""
    await settle(keeper)
    keeper.add(new(source))
    keeper.remove("c")
    await settle(keeper)
    assert phases(keeper) == {"a": "serving", "b": "serving"}
    fleet.replicas_start = False
    keeper.add(new(source))
    await until(keeper, lambda: phases(keeper).get("c") == "starting")
    keeper.remove("c")
    await settle(keeper)
    assert phases(keeper) == {"a": "serving", "b": "serving"}
    assert "c" not in fleet.running


async def test_a_command_during_a_step_is_not_lost(keeper: ModelKeeper, fleet: FakeFleet) -> None:
    """A removal that comes while Serve is being asked wins over the step that was decided before it."""
    await settle(keeper)
    del fleet.running["a"]  # it will be deployed again
    deploy: Callable[[ModelEntry, ModelSet], Awaitable[None]] = fleet.deploy

    async def removed_meanwhile(entry: ModelEntry, models: ModelSet) -> None:
        await deploy(entry, models)
        keeper.remove("a")

    fleet.deploy = removed_meanwhile  # type: ignore[method-assign]
    await keeper.tick()
    assert phases(keeper)["a"] == "draining"


async def test_limits_reach_every_replica(keeper: ModelKeeper, fleet: FakeFleet) -> None:
    """Also one that takes another's place later; what is not given stays, and auto is what the engines began with."""
    await settle(keeper)
    keeper.limit("a", {"ceiling": 300 * MIB})
    await settle(keeper)
    assert [engine.ceiling_bytes for engine in fleet.engines.values()] == [300 * MIB, 300 * MIB, GIB]
    fleet.engine("a-1", "a", Limits(LEAST, GIB))
    keeper.limit("a", {"guarantee": 100 * MIB})
    await settle(keeper)
    assert [engine.ceiling_bytes for engine in fleet.engines.values()] == [300 * MIB, 300 * MIB, GIB]
    assert [engine.guarantee_bytes for engine in fleet.engines.values()] == [100 * MIB, 100 * MIB, LEAST]
    keeper.limit("a", {"guarantee": None, "ceiling": None})
    await settle(keeper)
    assert [engine.guarantee_bytes for engine in fleet.engines.values()] == [LEAST] * 3
    assert [engine.ceiling_bytes for engine in fleet.engines.values()] == [GIB] * 3
    assert keeper.models.get("a").limits is None, "engines register with these by themselves"
    limited = len(fleet.calls)
    await settle(keeper)
    assert len(fleet.calls) == limited, "nothing is left to change"


async def test_limits_that_wait_for_others_come_later(keeper: ModelKeeper, fleet: FakeFleet) -> None:
    """A guarantee that fits only when a neighbour's has been lowered is applied once that is so."""
    await settle(keeper)
    keeper.limit("b", {"guarantee": GIB - 2 * LEAST})
    await settle(keeper)
    keeper.limit("b", {"guarantee": LEAST})
    keeper.limit("a", {"guarantee": (GIB - LEAST) // 2})
    await keeper.tick()
    assert fleet.engines["a-1"].guarantee_bytes == LEAST
    await keeper.tick()
    assert fleet.engines["a-1"].guarantee_bytes == (GIB - LEAST) // 2


async def test_nothing_is_concluded_while_serve_is_away(keeper: ModelKeeper, fleet: FakeFleet) -> None:
    """Models are neither deployed again nor given up; when it is back, all is as it was."""
    await settle(keeper)
    calls = len(fleet.calls)
    fleet.away = True
    await settle(keeper)
    fleet.away = False
    await settle(keeper)
    assert len(fleet.calls) == calls
    assert phases(keeper) == {"a": "serving", "b": "serving"}


async def test_a_restart_loses_nothing(keeper: ModelKeeper, fleet: FakeFleet, tmp_path: Path, source: str) -> None:
    """A keeper that starts anew goes on from the file: models that were added, limits, and a removal half-way."""
    await settle(keeper)
    keeper.add(new(source))
    await until(keeper, lambda: phases(keeper).get("c") == "serving")
    keeper.limit("b", {"ceiling": 300 * MIB})
    fleet.in_flight = {"a": 1}
    keeper.remove("a")
    known = keeper.models
    assert (tmp_path / "models.json").stat().st_mode & 0o777 == 0o600
    fleet.keeper = again = ModelKeeper(tmp_path / "models.json", ModelSet(), ClusterConfig(), fleet)
    assert again.models == known
    await settle(again)
    assert phases(again) == {"a": "draining", "b": "serving", "c": "serving"}
    assert fleet.engines["b-0"].ceiling_bytes == 300 * MIB
    fleet.in_flight = {}
    await settle(again)
    assert phases(again) == {"b": "serving", "c": "serving"}


async def test_the_budget_grows_with_the_models(keeper: ModelKeeper, fleet: FakeFleet, source: str) -> None:
    """Where its size was left to the cluster, the agent is told the new budget before the replicas start."""
    keeper.models = replace(keeper.models, budget_bytes=3 * LEAST)
    await settle(keeper)
    keeper.add(new(source))
    await until(keeper, lambda: phases(keeper).get("c") == "serving")
    assert fleet.budget_bytes == keeper.models.budget_bytes > 3 * LEAST
    assert keeper.models.promised_bytes <= keeper.models.budget_bytes
