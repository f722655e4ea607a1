"""Targets of replicas: who gets which, when they change, and who may give them out."""

import math
from dataclasses import replace
from typing import Any

import pytest

from cluster.config import ClusterConfig
from cluster.target_planner import SIZE_EVERY_S, TargetPlanner, TargetSettings
from memory_agent.reports import EngineReport
from replicas.targets import ReplicaTarget
from tests.unit.cluster.test_controller import engine

SETTINGS = TargetSettings(tpot_s=0.1)
EPOCH_MS = 5_000
FIRST = EPOCH_MS * 4096 + 1


@pytest.fixture
def planner() -> TargetPlanner:
    return TargetPlanner(SETTINGS, EPOCH_MS)


def busy(engine_id: str = "a", tpot_s: float = 0.09, **values: Any) -> EngineReport:
    """Eight requests; a step takes 10 ms, 1 ms a request and 0.1 ms a prompt token."""
    return engine(engine_id, running=8, waiting=0, tpot_s=tpot_s, kv_token_s=0.0, **values)


def plan(planner: TargetPlanner, report: EngineReport, now_s: float) -> ReplicaTarget:
    planner.plan(report, now_s)
    target = planner.target_for(report.engine_id)
    assert target is not None
    return target


def test_steps_are_as_long_as_the_tightest_class_allows(planner: TargetPlanner) -> None:
    """(100 ms - 10 - 8) / 0.1 prompt tokens beside 8 decodes; requests as many as decode in 100 ms, or the engine's
    most."""
    assert plan(planner, busy(), 0.0) == ReplicaTarget(FIRST, 828, 32)
    assert plan(planner, busy("b", max_num_seqs=256), 0.0) == ReplicaTarget(FIRST + 1, 828, 90)


def test_settings_bound_what_sizing_allows() -> None:
    """The configuration's bounds are the most, and all there is without sizing or before a step time is known."""
    settings = replace(SETTINGS, token_budget_max=300, active_max=5)
    alone = ReplicaTarget(FIRST, 300, 5)
    assert plan(TargetPlanner(settings, EPOCH_MS), busy(), 0.0) == alone
    assert plan(TargetPlanner(replace(settings, batch_sizing=False), EPOCH_MS), busy(), 0.0) == alone
    unknown = busy(step_s=0.0, row_s=0.0, token_s=0.0)
    assert plan(TargetPlanner(settings, EPOCH_MS), unknown, 0.0) == alone
    assert plan(TargetPlanner(SETTINGS, EPOCH_MS), unknown, 0.0) == ReplicaTarget(FIRST, 0, 0)


def test_the_tightest_request_counts_for_all_replicas_of_its_model_for_a_while(planner: TargetPlanner) -> None:
    """A request with an objective of 50 ms anywhere makes steps that short everywhere; of another model it does not;
    half a minute after the last one looser ones count, and without any the classes."""
    assert plan(planner, busy("a", 0.045, tpot_target_s=0.05), 0.0).token_budget_max == 328
    assert plan(planner, busy("b", 0.045), 0.5).token_budget_max == 328
    assert plan(planner, busy("c", model="other"), 0.5).token_budget_max == 828
    for at_s in (10, 20, 30, 31, 32, 33, 34, 35, 36):
        target = plan(planner, busy("b", 0.045, tpot_target_s=0.08), at_s)
    assert target.token_budget_max == 628
    for at_s in range(70, 76):
        target = plan(planner, busy("b", 0.045), at_s)
    assert target.token_budget_max == 828


def test_targets_do_not_flap(planner: TargetPlanner) -> None:
    """Requests that come and go, and a noisy measurement, leave the target of a steady load alone."""
    revisions = set()
    for step in range(400):
        report = busy(tpot_s=0.09 + 0.004 * math.sin(step))
        revisions.add(plan(planner, replace(report, running=8 + step % 3), step / 4).revision)
    assert len(revisions) == 1


def test_a_replica_is_looked_at_once_a_second(planner: TargetPlanner) -> None:
    """Reports that come sooner change nothing."""
    first = plan(planner, busy(), 0.0)
    assert plan(planner, busy(tpot_s=0.3), SIZE_EVERY_S - 0.01) == first
    assert plan(planner, busy(tpot_s=0.3), SIZE_EVERY_S).token_budget_max < first.token_budget_max


def test_an_engine_that_stands_still_measures_nothing(planner: TargetPlanner) -> None:
    """The same TPOT again is no news: it lowers nothing further, nor does the last one of an engine that is idle."""
    first = plan(planner, busy(tpot_s=0.3), 0.0)
    for at_s in range(1, 30):
        assert plan(planner, busy(tpot_s=0.3), at_s) == first
    other = TargetPlanner(SETTINGS, EPOCH_MS)
    idle = engine(running=0, waiting=0, tpot_s=0.3, kv_tokens=0, kv_token_s=0.0)
    assert plan(other, idle, 0.0).token_budget_max == 900


def test_load_moves_to_a_replica_with_room(planner: TargetPlanner) -> None:
    """A late replica is to get fewer requests than it runs where another one of the model has room, whose report is
    fresh. It runs those that come all the same."""
    late = replace(busy("late", tpot_s=0.15), running=16)
    target = plan(planner, late, 0.0)
    assert target.active_max == planner.requests_for(late) == 32
    planner.plan(busy("calm", tpot_s=0.02), 0.5)
    decision = planner.plan(replace(late, tpot_s=0.16), 1.0)
    assert decision is not None and decision.kind == "shift" and "another replica has room" in decision.reason
    assert decision.action == "14 of at most 32 requests from routers"
    assert planner.requests_for(late) == 14
    assert planner.target_for("late") == target
    later = TargetPlanner(SETTINGS, EPOCH_MS)
    later.plan(busy("calm", tpot_s=0.02), 0.0)
    later.plan(late, 5.0)
    assert later.requests_for(late) == 32, "it has not been heard of for five seconds"


@pytest.mark.parametrize(
    "other", [{"tpot_s": 0.095}, {"tpot_s": 0.02, "waiting": 40}, {"model": "other", "tpot_s": 0.02}]
)
def test_no_room_elsewhere(planner: TargetPlanner, other: dict[str, Any]) -> None:
    """Who is near its target, has a queue, or serves another model takes nothing over; nor is one's own room enough."""
    report = replace(busy("other"), **other)
    planner.plan(report, 0.0)
    planner.plan(busy("late", tpot_s=0.01), 0.5)
    late = replace(busy("late", tpot_s=0.15), running=16)
    planner.plan(late, 1.6)
    assert planner.requests_for(late) == 32


def test_decisions_carry_what_was_seen(planner: TargetPlanner) -> None:
    """A change is told with its reason and the numbers it follows from; no change is none."""
    decision = planner.plan(busy(), 0.0)
    assert decision is not None
    assert (decision.kind, decision.subject) == ("target", "a")
    assert decision.action == "828 tokens a step, 32 requests"
    assert decision.reason == "steps of 100 ms keep 100 ms a token"
    assert decision.inputs["running"] == 8 and decision.inputs["decode_ms"] == 18.0
    assert planner.plan(busy(tpot_s=0.091), 1.0) is None
    hopeless = TargetPlanner(replace(SETTINGS, tpot_s=0.005), EPOCH_MS).plan(busy(), 0.0)
    assert hopeless is not None and "best effort" in hopeless.reason


def test_a_new_life_goes_on_from_the_targets_at_work() -> None:
    """A controller that starts anew keeps the ceilings it finds, under revisions of its own; it does not forget what
    the old one had learned about this engine."""
    old = TargetPlanner(SETTINGS, EPOCH_MS)
    for at_s in range(30):
        target = plan(old, busy(tpot_s=0.12 + at_s / 1e6), at_s)
    assert target.token_budget_max < 500
    values = {"target_revision": target.revision, "token_budget_max": target.token_budget_max}
    new = TargetPlanner(SETTINGS, EPOCH_MS + 60_000)
    taken = plan(new, busy(tpot_s=0.095, active_max=target.active_max, **values), 0.0)
    assert taken.revision > target.revision
    assert replace(taken, revision=0) == replace(target, revision=0)


def test_a_controller_that_was_replaced_gives_out_nothing() -> None:
    """Once an engine has a target of a later life, this one has none for anybody, until it is known to lead: then it
    goes on above."""
    old, new = TargetPlanner(SETTINGS, EPOCH_MS), TargetPlanner(SETTINGS, EPOCH_MS + 1)
    plan(old, busy("a"), 0.0)
    plan(old, busy("b"), 0.0)
    later = plan(new, busy("a"), 0.0)
    assert old.plan(busy("a", tpot_s=0.5, target_revision=later.revision), 5.0) is None
    assert old.superseded and not new.superseded
    assert old.target_for("a") is None and old.target_for("b") is None
    old.lead()
    assert plan(old, busy("a", tpot_s=0.5, target_revision=later.revision), 6.0).revision > later.revision


def test_its_own_revisions_supersede_nobody(planner: TargetPlanner) -> None:
    """An engine that was forgotten and comes back with a target of this life is taken up again."""
    target = plan(planner, busy(), 0.0)
    planner.forget(busy())
    again = plan(planner, busy(target_revision=target.revision), 100.0)
    assert again.revision > target.revision


def test_settings_of_a_configuration() -> None:
    """The tightest TPOT of the classes, and the controller's bounds."""
    tree = {
        "slo": [{"name": "a", "tpot_ms": 80.0}, {"name": "b", "tpot_ms": 40.0}],
        "controller": {"active_max": 7, "batch_sizing": False},
    }
    config = ClusterConfig.model_validate(tree)
    assert TargetSettings.of(config) == TargetSettings(0, 7, False, 0.04, migration=True)
