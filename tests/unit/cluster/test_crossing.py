"""A request moves between replicas of two nodes with played agents: whatever fails, the client's tokens are whole."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError

import cluster.crossing
from cluster.crossing import Crossings
from cluster.migration import MigrationError
from cluster.move import Migrated
from memory_agent.courier import CourierError
from tests.unit.cluster.fake_replicas import INFO, stats
from tests.unit.cluster.moving_replicas import DEADLINE_S, LAST, Client, client

BLOCK = INFO.block_tokens


class PlayedAgents:
    """Both agents. What is fetched is at "mirror".

    Attributes:
        said: the calls, in short.
        fails: at this fetch ("ahead", "switch"): an error to raise, or "stuck".
    """

    def __init__(self) -> None:
        self.said: list[str] = []
        self.moves: set[str] = set()
        self.fails: dict[str, Exception | str] = {}
        self.cancelled = 0

    async def __call__(self, agent: str, method: str, *args: Any) -> Any:
        assert agent == "agent-b", "only the destination's is asked"
        if method == "forget":
            self.said.append("forget")
            self.moves.add(args[0])
            return await self._fail("forget")
        assert method == "fetch"
        source, origin, move, until, within_s = args
        assert (source, origin, within_s > 0) == ("agent-a", "there", True)
        assert until in (b"", bytes.fromhex(LAST))
        self.moves.add(move)
        self.said.append("switch" if until else "ahead")
        await self._fail(self.said[-1])
        return "mirror"

    async def _fail(self, what: str) -> None:
        match self.fails.get(what):
            case Exception() as error:
                raise error
            case "stuck":
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    self.cancelled += 1
                    raise


def remote(error: Exception) -> Exception:
    """As Ray raises what an actor's method has raised."""
    return RayTaskError("fetch", "Traceback\nCourierError: on purpose", error).as_instanceof_cause()  # type: ignore[no-any-return,no-untyped-call]


FAULTS: list[Exception | str] = [
    ActorDiedError(),
    ObjectLostError("00" * 28, None, ""),  # type: ignore[no-untyped-call]
    remote(CourierError("on purpose")),
    ValueError("no such actor"),
    "stuck",
]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("AHEAD_S", 0.05), ("SWITCH_S", 0.05), ("_ANSWER_S", 0.05)):
        monkeypatch.setattr(cluster.crossing, name, seconds)
        if hasattr(cluster.migration, name):
            monkeypatch.setattr(cluster.migration, name, seconds)


def check_moved(one: Client, agents: PlayedAgents) -> None:
    assert one.b.said[-1] == "moved here"
    assert one.core.mover.moved == 1
    assert (one.core.continued, one.core.retried) == (0, 0)
    assert len(agents.moves) == 1
    assert agents.said[-1] == "forget"
    assert one.a.said[-1] == "end"


async def test_what_is_staged_crosses_before_the_destination_looks_for_it() -> None:
    agents = PlayedAgents()
    async with client(agents) as one:
        moved = await one.migrate()
        assert moved.blocks_ahead >= 2
        await one.check_to_the_end()
        assert agents.said == ["ahead"] * moved.rounds + ["switch", "forget"]
        assert {origin for origin, _ in one.b.found} == {"mirror"}
        assert one.b.found[-1][1] > moved.blocks_ahead * BLOCK
        check_moved(one, agents)


async def test_on_one_node_no_agent_is_asked() -> None:
    agents = PlayedAgents()
    async with client(agents) as one:
        one.core.replicas = [replace(replica, node_id="n") for replica in one.core.replicas]
        await one.migrate()
        await one.check_to_the_end()
        assert not agents.said
        assert {origin for origin, _ in one.b.found} == {"there"}


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
async def test_a_fetch_ahead_that_fails_leaves_the_request_at_its_source(fault: Exception | str) -> None:
    agents = PlayedAgents()
    agents.fails = {"ahead": fault}
    async with client(agents) as one:
        with pytest.raises(MigrationError, match="does not get to the other node"):
            await one.migrate()
        await one.check_to_the_end()
        assert agents.said == ["ahead", "forget"]
        assert "switch" not in one.a.said
        assert one.a.said[-1] == "end"
        assert one.b.said == []
        assert agents.cancelled == (fault == "stuck")


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
async def test_a_fetch_that_fails_after_the_switch_has_the_last_blocks_computed(fault: Exception | str) -> None:
    """At the destination, which is told of no more than it has, so that it does not wait."""
    agents = PlayedAgents()
    agents.fails = {"switch": fault}
    async with client(agents) as one:
        moved = await one.migrate()
        await one.check_to_the_end()
        assert one.b.found[-1][1] == moved.blocks_ahead * BLOCK
        check_moved(one, agents)
        assert agents.cancelled == (fault == "stuck")


@pytest.mark.parametrize("fault", [ActorDiedError(), "stuck"], ids=repr)
async def test_an_agent_that_forgets_nothing_is_not_waited_for(fault: Exception | str) -> None:
    agents = PlayedAgents()
    agents.fails = {"forget": fault}
    async with client(agents) as one:
        await one.migrate()
        await one.check_to_the_end()
        check_moved(one, agents)


async def moving_over(one: Client, agents: PlayedAgents) -> "asyncio.Task[Migrated]":
    """A migration whose last blocks are crossing."""
    moving = asyncio.create_task(one.migrate())
    async with asyncio.timeout(DEADLINE_S):
        while "switch" not in agents.said:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
    return moving


async def test_a_client_that_goes_away_while_its_last_blocks_cross_ends_the_migration() -> None:
    agents = PlayedAgents()
    agents.fails = {"switch": "stuck"}
    async with client(agents) as one:
        moving = await moving_over(one, agents)
        await one.core.abort_requests_async(["r"])
        await asyncio.wait([moving], timeout=DEADLINE_S)
        moving.exception()
        assert (agents.said[-1], one.a.said[-1]) == ("forget", "end")
        assert not one.core._relays
        assert "moved here" not in one.b.said


async def test_who_watches_attempts_gives_none_up_while_the_last_blocks_cross(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.migration, "SWITCH_S", 0.3)
    agents = PlayedAgents()
    agents.fails = {"switch": "stuck"}
    async with client(agents) as one:
        moving = await moving_over(one, agents)
        one.core._give_up(one.core._relays["r"], "on purpose")
        await moving
        await one.check_to_the_end()
        check_moved(one, agents)


async def test_a_destination_that_dies_after_the_crossing_is_continued_elsewhere() -> None:
    agents = PlayedAgents()
    async with client(agents) as one:
        await one.outlive_its_destination()
        assert agents.said[-1] == "forget"


def test_only_two_nodes_with_agents_need_a_crossing() -> None:
    a, b = (replace(stats(name), agent=f"agent-{name}") for name in "ab")
    for there in ([a], [a, replace(b, node_id=a.node_id)], [a, replace(b, agent="")], [replace(a, agent=""), b]):
        assert Crossings(lambda there=there: there, PlayedAgents()).between("a", "b", "m") is None  # type: ignore[misc]
    assert Crossings(lambda: [a, b], PlayedAgents()).between("a", "b", "m") is not None
