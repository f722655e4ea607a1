"""The controller: what it accepts, plans, shows and forgets; on its pure core, and its long poll on the actor class."""

import asyncio
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import RayError

from cluster.cluster_view import FORGET_AFTER_S, STALE_AFTER_S, ClusterView, PressureView, ReportOutcome
from cluster.controller import Controller
from cluster.target_planner import TargetSettings
from memory_agent.reports import DeviceReport, EngineReport, PressureLevel
from replicas.step_time import StepTime
from replicas.targets import ReplicaTarget

GIB = 1 << 30


BOUNDS = TargetSettings(token_budget_max=512, active_max=16, batch_sizing=False)


def engine(engine_id: str = "a", **values: Any) -> EngineReport:
    known: dict[str, Any] = {
        "model": "m", "pid": 1, "state": "LIVE", "limit_bytes": GIB, "lease_revision": 1, "applied_revision": 1,
        "guarantee_bytes": GIB // 4, "ceiling_bytes": 2 * GIB, "weights_bytes": 300, "held_bytes_os": 50,
        "start_bytes": 0, "committed_bytes": 50,
        "activation_bytes": 7, "activation_held_bytes": 5, "token_budget": 64, "used_bytes": 20,
        "demand_bytes": GIB // 2, "rss_bytes": 900, "running": 2, "waiting": 3,
        "preemptions": 0, "host_bytes": 11, "host_stored_blocks": 0, "host_loaded_blocks": 0, "host_declined_blocks": 0,
        "host_evicted_blocks": 0, "host_damaged_blocks": 0, "host_stored_tails": 0, "host_loaded_tails": 0,
        "host_logical_bytes": 0, "set_aside": 0, "host_capacity_bytes": 40, "host_hits": 0, "host_misses": 0,
        "host_stores_moved": 0, "host_stores_probed": 0, "host_stores_declined": 0,
        "host_loads_moved": 0, "host_loads_probed": 0, "host_loads_declined": 0,
        "inflate_s": 0.0, "deflate_s": 0.0, "borrow_count": 0, "borrow_bytes": 0, "lend_count": 0, "lend_bytes": 0,
        "inflate_count": 0, "inflate_bytes": 0, "deflate_count": 0, "deflate_bytes": 0,
        "map_failures": 0, "conservation_failures": 0, "overdue_bytes": 0,
        "blocks_mapped": 1, "reachable_blocks": 9, "blocks_ceiling": 10, "block_tokens": 128,
        "kv_usage": 0.25, "target_revision": 0, "token_budget_max": 0, "active_max": 0,
        "max_num_seqs": 32, "max_num_batched_tokens": 1024, "kv_tokens": 300,
        "step_s": 0.01, "row_s": 1e-3, "kv_token_s": 1e-7, "token_s": 1e-4, "pair_s": 0.0,
        "tpot_s": 0.02, "tpot_target_s": 0.0, "ttft_share": 0.0, "prompt_tokens": 100.0,
        "prompt_of_token": 100.0, "prompt_rate": 0.0,
        "pressure": PressureLevel.NORMAL, "pressure_since_s": 1.0,
    }  # fmt: skip
    return EngineReport(engine_id=engine_id, **(known | values))


def report(sequence: int, *engines: EngineReport, epoch: int = 100, **values: Any) -> DeviceReport:
    known: dict[str, Any] = {
        "node": "n1", "device": "cpu", "agent_pid": 5, "taken_at_s": 1.0, "budget_bytes": 2 * GIB,
        "weights_bytes": 1000, "pressure": PressureLevel.NORMAL, "pressure_since_s": 1.0, "dead_engines": 0,
    }  # fmt: skip
    return DeviceReport(agent_epoch_ns=epoch, sequence=sequence, engines=engines, **(known | values))


@pytest.fixture
def view() -> ClusterView:
    return ClusterView(BOUNDS, epoch_ms=1_000_000)


def outcomes(view: ClusterView, now_s: float = 0.0) -> dict[str, int]:
    counts: dict[str, int] = view.snapshot(now_s)["reports"]
    return counts


def test_what_an_engine_gets_back_is_in_the_view(view: ClusterView) -> None:
    """Of two on a device, one has lent almost all: it can have half of the budget, or its guarantee if that is more,
    within its tensor. One alone has what its lease says."""

    def share(*engines: EngineReport, sequence: int) -> tuple[int, int]:
        view.receive(report(sequence, *engines), 0.0)
        one = view.pressure_view(0.0).engines["a"]
        return one.kv_tokens, one.kv_share_tokens

    lent = {"limit_bytes": GIB // 8, "reachable_blocks": 10, "blocks_ceiling": 1000}
    assert share(engine(**lent), engine("b"), sequence=1) == (10 * 128, 80 * 128)
    assert share(engine(**lent, guarantee_bytes=3 * GIB // 2), engine("b"), sequence=2) == (10 * 128, 120 * 128)
    assert share(engine(**lent | {"blocks_ceiling": 50}), engine("b"), sequence=3) == (10 * 128, 50 * 128)
    assert share(engine(**lent), sequence=4) == (10 * 128, 0)


def test_reports_count_in_order(view: ClusterView) -> None:
    """A repeated or overtaken report is refused and counted; a new life of the agent starts its own order."""
    assert view.receive(report(5, engine(running=5)), 0.0) is ReportOutcome.APPLIED
    assert view.receive(report(5, engine(running=9)), 0.1) is ReportOutcome.STALE
    assert view.receive(report(4, engine(running=9)), 0.2) is ReportOutcome.STALE
    assert view.receive(report(99, engine(running=9), epoch=99), 0.3) is ReportOutcome.STALE
    assert view.pressure_view(0.3).engines["a"].running == 5
    assert view.receive(report(1, engine(running=1), epoch=101), 0.4) is ReportOutcome.APPLIED
    assert view.pressure_view(0.4).engines["a"].running == 1
    assert outcomes(view) == {"applied": 2, "stale": 3, "invalid": 0}


def test_an_order_from_long_ago_binds_nobody(view: ClusterView) -> None:
    """If a node's clock was set back between two lives of its agent, it is heard once the old report is absent."""
    view.receive(report(5, engine(), epoch=100), 0.0)
    assert view.receive(report(1, engine(), epoch=50), 1.0) is ReportOutcome.STALE
    assert view.receive(report(2, engine(), epoch=50), STALE_AFTER_S + 0.1) is ReportOutcome.APPLIED


@pytest.mark.parametrize(
    "broken",
    [
        report(2, budget_bytes=-1),
        report(2, taken_at_s=math.nan),
        report(2, engine(), engine("b", kv_usage=math.nan)),
        report(2, engine(kv_usage=math.inf)),
        report(2, engine(used_bytes=-5)),
        report(2, engine(waiting=-1)),
        report(2, engine(tpot_s=math.nan)),
        report(2, engine(token_s=-1e-9)),
        report(2, engine(prompt_tokens=math.inf)),
    ],
)
def test_impossible_numbers_are_refused(view: ClusterView, broken: DeviceReport) -> None:
    """A report with a negative or non-finite number changes nothing but the count of invalid ones."""
    view.receive(report(1, engine(running=7)), 0.0)
    assert view.receive(broken, 0.1) is ReportOutcome.INVALID
    assert view.pressure_view(0.1).engines["a"].running == 7
    assert outcomes(view) == {"applied": 1, "stale": 0, "invalid": 1}


def test_old_report_reads_as_absent(view: ClusterView) -> None:
    """After three seconds without a report a device is in no view, is listed as absent, and later forgotten."""
    view.receive(report(1, engine()), 10.0)
    view.receive(report(1, engine("b"), node="n2"), 12.0)
    at_s = 10.0 + STALE_AFTER_S + 0.01
    assert set(view.pressure_view(at_s).engines) == {"b"}
    snapshot = view.snapshot(at_s)
    assert [node["node"] for node in snapshot["nodes"]] == ["n2"]
    assert [(one["node"], one["report_age_s"]) for one in snapshot["absent_devices"]] == [("n1", 3.01)]
    assert view.targets.target_for("a") is not None, "its engine may live on"
    view.receive(report(2, engine("b"), node="n2"), 10.1 + FORGET_AFTER_S)
    assert view.snapshot(10.1 + FORGET_AFTER_S)["absent_devices"] == []
    assert view.targets.target_for("a") is None


def test_view_revision_grows_with_changes_only(view: ClusterView) -> None:
    """The revision grows when numbers change or an engine turns absent; not with age alone."""
    view.receive(report(1, engine()), 0.0)
    first = view.pressure_view(0.0)
    assert first.revision > 1_000_000
    view.receive(report(2, engine()), 0.25)
    same = view.pressure_view(0.5)
    assert same.revision == first.revision
    assert same.engines["a"].age_s == 0.25
    view.receive(report(3, engine(pressure=PressureLevel.CRITICAL)), 0.75)
    critical = view.pressure_view(0.75)
    assert (critical.revision, critical.engines["a"].level) == (first.revision + 1, PressureLevel.CRITICAL)
    assert view.pressure_view(5.0) == PressureView(first.revision + 2, {})


def test_demand_is_shown_against_the_limit(view: ClusterView) -> None:
    """demand_ratio is demand over limit, finite even where the limit is still zero."""
    view.receive(report(1, engine(), engine("b", limit_bytes=0)), 0.0)
    engines = view.pressure_view(0.0).engines
    assert (engines["a"].demand_ratio, engines["a"].kv_usage) == (0.5, 0.25)
    assert math.isfinite(engines["b"].demand_ratio) and engines["b"].demand_ratio > 1


def test_routers_get_what_the_engines_measured(view: ClusterView) -> None:
    """Step time, tokens and limits are in the view; an engine that has learned nothing yet has no step time."""
    view.receive(report(1, engine(), engine("b", step_s=0.0, row_s=0.0, kv_token_s=0.0, token_s=0.0)), 0.0)
    a, b = view.pressure_view(0.0).engines.values()
    assert a.step_time == StepTime(0.01, 1e-3, 1e-7, 1e-4, 0.0)
    assert (a.kv_used_tokens, a.max_num_seqs, a.max_num_batched_tokens, a.prompt_tokens) == (300, 32, 1024, 100.0)
    assert b.step_time is None


def test_moves_are_planned_shown_and_explained_once() -> None:
    """A full replica beside an empty one: the order is in the view until the next plan, and why is told once; none
    where moving is switched off."""
    full = engine("full", used_bytes=9 * 50, demand_bytes=9 * 50, kv_usage=1.0, running=9, waiting=0)
    empty = engine("empty", used_bytes=0, demand_bytes=0, kv_usage=0.0, running=0, waiting=0)
    for migration in (True, False):
        view = ClusterView(replace(BOUNDS, migration=migration), epoch_ms=1000)
        revision = view.pressure_view(0.0).revision
        view.receive(report(1, full, empty), now_s=0.3)
        shown = view.pressure_view(0.3)
        view.receive(report(2, full, empty), now_s=1.0)
        again = view.pressure_view(1.0)
        told = [one for one in view.decisions.last(10, "full", 1.0) if one["kind"] == "move"]
        if not migration:
            assert shown.moves == () and told == []
            continue
        assert [(one.source, one.destination) for one in shown.moves] == [("full", "empty")]
        assert shown.revision > revision and shown.moves[0].number > 1000
        assert again.moves[0].number > shown.moves[0].number
        assert len(told) == 1 and "a request to empty" in told[0]["action"] and "KV tokens" in told[0]["reason"]
        view.receive(report(9, engine("full", waiting=0), empty), now_s=3.0)
        assert view.pressure_view(3.0).moves == ()


def test_every_reported_engine_has_a_target(view: ClusterView) -> None:
    """The target carries the settings' bounds; an engine that was never reported, or left, has none."""
    assert view.targets.target_for("a") is None
    view.receive(report(1, engine("a"), engine("b")), 0.0)
    target = view.targets.target_for("a")
    assert target == ReplicaTarget(1_000_000 * 4096 + 1, token_budget_max=512, active_max=16)
    view.receive(report(2, engine("a", target_revision=target.revision)), 0.1)
    assert view.targets.target_for("a") == target, "nothing changed"
    assert view.targets.target_for("b") is None


def test_target_revision_grows_across_restarts() -> None:
    """A controller that starts anew publishes beyond the revision that the replica reports, so that it is taken."""
    view = ClusterView(replace(BOUNDS, token_budget_max=99), epoch_ms=2000)
    before = 1000 * 4096 + 41
    view.receive(report(1, engine(target_revision=before)), 0.0)
    target = view.targets.target_for("a")
    assert target == ReplicaTarget(2000 * 4096 + 1, token_budget_max=99, active_max=16)
    view.receive(report(2, engine(target_revision=target.revision)), 0.1)
    assert view.targets.target_for("a") == target


def test_snapshot_accounts_for_every_byte_and_is_json(view: ClusterView) -> None:
    """Per device the owners sum to the budget, weights stand beside them, and all of it survives JSON."""
    view.receive(report(1, engine(), engine("b", used_bytes=70, held_bytes_os=90)), 0.0)
    snapshot = view.snapshot(1.5)
    assert json.loads(json.dumps(snapshot, allow_nan=False)) == snapshot
    device = snapshot["nodes"][0]["devices"][0]
    memory = device["memory"]
    assert memory == {
        "weights_bytes": 600,
        "kv_used_bytes": 90,
        "kv_cached_bytes": 50,
        "activation_bytes": 10,
        "start_bytes": 0,
        "free_bytes": 2 * GIB - 150,
        "host_buffer_bytes": 22,
    }
    owners = ("kv_used_bytes", "kv_cached_bytes", "activation_bytes", "start_bytes", "free_bytes")
    assert sum(memory[owner] for owner in owners) == device["budget_bytes"]
    assert (device["running"], device["waiting"], device["report_age_s"]) == (4, 6, 1.5)
    assert (device["pressure"], device["replicas"][1]["engine_id"]) == ("NORMAL", "b")
    target = {"revision": 1_000_000 * 4096 + 1, "token_budget_max": 512, "active_max": 16}
    assert device["replicas"][0]["target"] == target


def test_a_start_takes_its_part_of_the_budget(view: ClusterView) -> None:
    """What starts have been granted is not free, what they wait for is; nor is what weights take beyond their room."""
    granted = engine("b", state="STARTING", start_bytes=GIB // 2, limit_bytes=GIB // 2, weights_bytes=900)
    waiting = engine("c", state="STARTING", start_bytes=GIB // 2, limit_bytes=GIB // 4, weights_bytes=400)
    view.receive(report(1, engine(), granted, waiting), 0.0)
    memory = view.snapshot(0.0)["nodes"][0]["devices"][0]["memory"]
    assert (memory["start_bytes"], memory["weights_bytes"]) == (GIB // 2, 1600)
    assert memory["free_bytes"] == 2 * GIB - GIB // 2 - 150 - 15 - 600


def test_snapshot_never_shows_negative_bytes(view: ClusterView) -> None:
    """Counters of different moments (used beyond held, held beyond a lowered budget) show as zero, not below."""
    view.receive(report(1, engine(used_bytes=100, held_bytes_os=60), budget_bytes=80), 0.0)
    memory = view.snapshot(0.0)["nodes"][0]["devices"][0]["memory"]
    assert (memory["kv_cached_bytes"], memory["free_bytes"]) == (0, 0)


async def started() -> Controller:
    controller = Controller.__new__(Controller)
    await Controller.__init__(controller, BOUNDS)  # what Ray does with an actor's coroutine constructor
    return controller


def test_watch_returns_at_once_when_behind_and_waits_when_not() -> None:
    """A watcher that has seen less gets the view at once; one that is up to date gets the next change."""

    async def scenario() -> None:
        controller = await started()
        await controller.report_device(report(1, engine()))
        first = await asyncio.wait_for(controller.watch(0, 20.0), 5.0)
        assert set(first.engines) == {"a"}
        waiting = asyncio.create_task(controller.watch(first.revision, 20.0))
        await controller.report_device(report(2, engine()))
        done, _ = await asyncio.wait([waiting], timeout=0.1)
        assert not done, "the numbers did not change"
        await controller.report_device(report(3, engine(running=3)))
        second = await asyncio.wait_for(waiting, 5.0)
        assert second.revision > first.revision
        assert second.engines["a"].running == 3

    asyncio.run(scenario())


def test_watch_ends_at_its_timeout_with_the_same_revision() -> None:
    """Where nothing changes, the answer at the timeout is the present view."""

    async def scenario() -> None:
        controller = await started()
        await controller.report_device(report(1, engine()))
        first = await controller.watch(0, 1.0)
        again = await asyncio.wait_for(controller.watch(first.revision, 0.05), 5.0)
        assert again.revision == first.revision
        assert replace(again.engines["a"], age_s=0.0) == replace(first.engines["a"], age_s=0.0)

    asyncio.run(scenario())


def test_view_of_a_former_life_is_never_taken_for_a_present_one() -> None:
    """A watcher that comes with a revision of the controller's former life is answered at once."""

    async def scenario() -> None:
        old = await (await started()).watch(0, 0.0)
        new = await started()
        await new.report_device(report(1, engine()))
        view = await asyncio.wait_for(new.watch(old.revision, 20.0), 5.0)
        assert set(view.engines) == {"a"}

    asyncio.run(scenario())


class Named:
    """Stands for the actor that has the controller's name: what it answers, or why it cannot."""

    def __init__(self, life: str | Exception) -> None:
        self.life = self
        self._life = life

    async def remote(self) -> str:
        if isinstance(self._life, Exception):
            raise self._life
        return self._life


class Ended(BaseException):
    """What ends an actor."""


@pytest.mark.parametrize("named", ["own", "other", "nobody", "away"])
def test_who_has_the_name_leads(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    """A report with a target of a later life: the controller with the name goes on above it, one whose name is
    another's ends, and as long as nobody answers to the name there are no targets."""

    async def scenario() -> None:
        controller = await started()
        await controller.report_device(report(1, engine()))
        mine = await controller.target_for("a")
        assert mine is not None
        lives: dict[str, str | Exception] = {"own": await controller.life(), "other": "x", "away": RayError("away")}

        def get_actor(name: str, namespace: str) -> Named:
            if named == "nobody":
                raise ValueError("no such actor")
            return Named(lives[named])

        def exit_actor() -> None:
            raise Ended

        monkeypatch.setattr("cluster.controller.ray.get_actor", get_actor)
        monkeypatch.setattr("cluster.controller.exit_actor", exit_actor)
        later = mine.revision + 10**9
        if named == "other":
            with pytest.raises(Ended):
                await controller.report_device(report(2, engine(target_revision=later)))
            return
        await controller.report_device(report(2, engine(target_revision=later)))
        await controller.report_device(report(3, engine(target_revision=later)))
        target = await controller.target_for("a")
        if named == "own":
            assert target is not None and target.revision > later
        else:
            assert target is None

    asyncio.run(scenario())
