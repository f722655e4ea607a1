"""Which replicas hand requests over: only where it helps, and never back and forth."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.move import Trigger
from cluster.move_planner import HOLD_S, PLAN_EVERY_S, Candidate, MoveOrder, MovePlanner, PlannedMove, pick
from cluster.simulator.sim_replica import SimReplica
from memory_agent.reports import EngineReport, PressureLevel
from replicas.engine_profile import load_profile
from replicas.step_time import StepTime

EMPTY = SimReplica("", "node", load_profile("llama-3.1-8b-h100"), 512).report(0.0, StepTime(0.0)).engines[0]
BLOCK_TOKENS, BLOCKS, BLOCK_BYTES = 16, 1000, 4096
CAPACITY = BLOCKS * BLOCK_TOKENS


def report(name: str, used: int, running: int = 8, waiting: int = 0, wanted: int = 0, **changes: Any) -> EngineReport:
    """Of an engine that uses so many KV tokens, for whose waiting requests ``wanted`` more are missing."""
    return replace(
        EMPTY,
        engine_id=name,
        model="m",
        reachable_blocks=BLOCKS,
        block_tokens=BLOCK_TOKENS,
        kv_usage=used / CAPACITY,
        used_bytes=used // BLOCK_TOKENS * BLOCK_BYTES,
        demand_bytes=(used + wanted) // BLOCK_TOKENS * BLOCK_BYTES,
        blocks_mapped=BLOCKS,
        committed_bytes=BLOCKS * BLOCK_BYTES,
        running=running,
        waiting=waiting,
        max_num_seqs=64,
        step_s=0.01,
        kv_tokens=used,
        pressure=PressureLevel.NORMAL,
        **changes,
    )


def planned(planner: MovePlanner, *reports: EngineReport, now_s: float = 10.0) -> list[PlannedMove]:
    return planner.plan([(one, 0) for one in reports], now_s)


def only(moves: list[PlannedMove]) -> MoveOrder:
    (move,) = moves
    assert move.reason
    return move.order


def test_a_replica_about_to_be_full_is_helped_by_the_emptiest() -> None:
    full, half, empty = report("full", 15500), report("half", 8000), report("empty", 1000)
    order = only(planned(MovePlanner(0), full, half, empty))
    assert (order.source, order.destination, order.trigger) == ("full", "empty", Trigger.EXHAUSTION)
    # 8 requests grow by 200 tokens each in two seconds of steps of 10 ms.
    assert order.tokens == 15500 + 1600 - CAPACITY
    assert 0 < order.room_tokens <= CAPACITY - 1000 - 1600 and not order.queued


def test_a_prompt_that_does_not_fit_is_made_room_for() -> None:
    order = only(planned(MovePlanner(0), report("a", 10000, waiting=1, wanted=8000), report("b", 9000)))
    assert (order.trigger, order.source, order.queued) == (Trigger.FRAGMENTATION, "a", True)
    assert order.tokens == 10000 + 1600 + 8000 - CAPACITY


@pytest.mark.parametrize(
    "other",
    [
        report("b", 14500),
        report("b", 1000, waiting=1),
        report("b", 1000, running=64),
        replace(report("b", 1000), pressure=PressureLevel.ELEVATED),
        replace(report("b", 1000), model="another"),
        replace(report("b", 1000), reachable_blocks=0),
        replace(report("b", 1000), active_max=8),
    ],
)
def test_nobody_is_sent_where_there_is_no_room(other: EngineReport) -> None:
    assert planned(MovePlanner(0), report("a", 15900), other) == []


def test_a_replica_without_need_keeps_its_requests() -> None:
    assert planned(MovePlanner(0), report("a", 12000), report("b", 100)) == []


def test_the_only_request_of_a_replica_stays() -> None:
    assert planned(MovePlanner(0), report("a", 15950, running=1), report("b", 100)) == []


def test_what_is_late_once_is_not_late_yet() -> None:
    """Steps that are too slow, or a queue that stands, count when two plans in turn have seen them."""
    planner = MovePlanner(0)
    slow = replace(report("a", 9000), tpot_s=0.2, tpot_target_s=0.1, step_s=0.15)
    waits = replace(report("a", 900, waiting=3), ttft_share=0.5)
    for late, queued in ((slow, False), (waits, True)):
        assert planned(planner, late, report("b", 900), now_s=10.0) == []
        order = only(planned(planner, late, report("b", 900), now_s=10.0 + PLAN_EVERY_S))
        assert (order.trigger, order.tokens, order.queued) == (Trigger.SLO, 0, queued)
        planner = MovePlanner(0)


def test_a_replica_whose_steps_are_as_slow_is_no_help() -> None:
    planner = MovePlanner(0)
    slow = replace(report("a", 9000), tpot_s=0.2, tpot_target_s=0.1, step_s=0.15)
    for now_s in (10.0, 11.0, 12.0):
        assert planned(planner, slow, replace(report("b", 900), step_s=0.14), now_s=now_s) == []


def test_what_is_on_its_way_counts_where_it_goes() -> None:
    """Reports are behind: the next orders do not fill a replica twice."""
    planner, total = MovePlanner(0), 0
    for step in range(3):
        moves = planned(planner, report("a", 15900), report("b", 8500), now_s=10 + step * PLAN_EVERY_S)
        total += sum(max(move.order.tokens, 15900 // 8) for move in moves)
    assert 0 < total + 8500 + 1600 <= CAPACITY


def test_numbers_grow_with_the_lives_of_the_controller() -> None:
    first, later = (only(planned(MovePlanner(epoch), report("a", 15900), report("b", 0))) for epoch in (1000, 2000))
    assert 1000 < first.number < later.number


@settings(max_examples=50)
@given(st.integers(2, 6), st.integers(1, 12), st.randoms(use_true_random=False))
def test_a_steady_load_comes_to_rest(replicas: int, size: int, rng: Any) -> None:
    """However requests lie on replicas: they move until nobody is in need who can be helped, no request goes back to
    where it was within the hold, and then nothing moves any more."""
    planner, tokens = MovePlanner(0), size * 300
    fit = CAPACITY // tokens
    loads = [rng.randint(1, 2 * fit) for _ in range(replicas)]
    room = [max(0, math.floor(0.95 * CAPACITY / tokens) - n) for n in loads]
    could_help = any(n > fit for n in loads) and any(room)
    moved_s: dict[tuple[int, int], float] = {}
    quiet = 0
    for step in range(60 + 5 * replicas * fit):
        now_s = step * PLAN_EVERY_S
        # Growth is none here: a step takes very long.
        there = [
            replace(report(f"r{i}", tokens * min(n, fit), min(n, fit), n - fit, tokens * (n - fit)), step_s=1e9)
            if n > fit
            else replace(report(f"r{i}", tokens * n, n), step_s=1e9)
            for i, n in enumerate(loads)
        ]
        moves = planned(planner, *there, now_s=now_s)
        quiet = 0 if moves else quiet + 1
        for move in moves:
            source, destination = int(move.order.source[1:]), int(move.order.destination[1:])
            assert now_s - moved_s.get((destination, source), -math.inf) >= HOLD_S
            moved_s[source, destination] = now_s
            assert tokens <= move.order.room_tokens
            loads[source] -= 1
            loads[destination] += 1
            assert loads[destination] <= fit
        if quiet > 10:
            break
    assert quiet > 10 and bool(moved_s) == could_help
    assert not any(n > fit for n in loads) or not any(tokens * (n + 1) <= 0.95 * CAPACITY for n in loads)


WAITING = [Candidate("w1", 500, False), Candidate("w2", 700, False), Candidate("w3", 5000, False)]
RUNNING = [Candidate("r1", 300, True), Candidate("r2", 900, True), Candidate("r3", 2000, True)]


@pytest.mark.parametrize(
    ("tokens", "room", "queued", "candidates", "wanted"),
    [
        (0, 4000, True, [*RUNNING, *WAITING], "w2"),
        (0, 4000, False, [*RUNNING, *WAITING], "r1"),
        (800, 4000, False, RUNNING, "r2"),
        (3000, 4000, True, RUNNING, "r3"),
        (3000, 1000, True, RUNNING, "r2"),
        (0, 400, True, [*RUNNING, *WAITING], "r1"),
        (0, 100, True, [*RUNNING, *WAITING], None),
        (0, 100, True, [], None),
    ],
)
def test_who_goes(tokens: int, room: int, queued: bool, candidates: list[Candidate], wanted: str | None) -> None:
    order = MoveOrder(1, "a", "b", Trigger.SLO, tokens, room, queued)
    chosen = pick(order, candidates)
    assert (chosen.request_id if chosen is not None else None) == wanted
