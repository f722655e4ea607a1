"""How large steps and batches may be."""

import math
from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st

from cluster.batch_sizing import (
    BatchBounds,
    BatchObservation,
    BatchSizing,
    Ceiling,
    prompt_tokens_within,
    requests_within,
    resumed,
)
from replicas.step_time import StepTime, StepWork

STEP = StepTime(step_s=0.01, row_s=5e-4, kv_token_s=1e-7, token_s=5e-5)
BOUNDS = BatchBounds(active_most=256, tokens_most=8192)

observations = st.builds(
    BatchObservation,
    running=st.integers(0, 256),
    kv_tokens=st.floats(0, 1e6),
    tpot_s=st.one_of(st.just(math.nan), st.floats(1e-4, 10)),
    tpot_target_s=st.floats(1e-3, 1),
    ttft_share=st.floats(0, 3),
    room_elsewhere=st.booleans(),
)


def seen(
    running: int = 20, tpot_s: float = math.nan, target_s: float = 0.05, room_elsewhere: bool = False
) -> BatchObservation:
    return BatchObservation(running, running * 1000.0, tpot_s, target_s, room_elsewhere=room_elsewhere)


@given(st.lists(observations, min_size=1, max_size=30))
def test_bounds_are_kept_whatever_is_seen(looks: list[BatchObservation]) -> None:
    """At least one request and a few tokens, at most what the engine can do."""
    sizing = BatchSizing()
    for now_s, one in enumerate(looks):
        sizing = sizing.next(one, STEP, BOUNDS, now_s)
        assert 1 <= sizing.active.value <= BOUNDS.active_most
        assert BOUNDS.tokens_least <= sizing.tokens.value <= BOUNDS.tokens_most


@given(observations, st.floats(0.1, 1), st.floats(1, 5))
def test_a_tighter_goal_never_allows_more(one: BatchObservation, goal_s: float, wider: float) -> None:
    """Feed forward is monotone in the goal, as long as one request keeps it."""
    assert prompt_tokens_within(goal_s, one, STEP, BOUNDS) <= prompt_tokens_within(wider * goal_s, one, STEP, BOUNDS)
    context = one.kv_tokens / one.running if one.running else one.prompt_tokens
    assume(STEP.decode_s(1, context) < goal_s)
    assert requests_within(goal_s, one, STEP, BOUNDS) <= requests_within(wider * goal_s, one, STEP, BOUNDS)


def test_feed_forward_fills_the_step_up_to_the_goal() -> None:
    """A step of the allowed tokens beside the running requests takes the goal, and no longer."""
    one = seen()
    tokens = prompt_tokens_within(0.05, one, STEP, BOUNDS)
    takes_s = STEP.seconds(StepWork(one.running, one.kv_tokens, tokens - one.running))
    assert 0.049 < takes_s <= 0.05
    rows = requests_within(0.05, one, STEP, BOUNDS)
    assert STEP.decode_s(rows, rows * 1000.0) <= 0.05 < STEP.decode_s(rows + 1, (rows + 1) * 1000.0)


def test_feedback_finds_what_the_model_does_not_know() -> None:
    """On a machine that is half as slow again as its model says, TPOT comes to its target from above, and does not go
    on falling, though what is measured lags behind what was changed."""
    sizing, measured_s = BatchSizing(), math.nan
    ends: list[float] = []
    for now_s in range(120):
        sizing = sizing.next(seen(tpot_s=measured_s), STEP, BOUNDS, now_s)
        real_s = 1.5 * STEP.seconds(StepWork(20, 20_000.0, sizing.tokens.value - 20))
        measured_s = real_s if math.isnan(measured_s) else measured_s + (real_s - measured_s) / 3
        ends.append(real_s)
    assert ends[0] > 1.4 * 0.05
    assert all(0.8 * 0.05 < one <= 1.1 * 0.05 for one in ends[30:])


def test_a_fall_waits_for_its_effect() -> None:
    """A TPOT that is still late in the next seconds lowers the goal once, and again after five seconds."""
    factors = []
    sizing = BatchSizing()
    for now_s in range(6):
        sizing = sizing.next(seen(tpot_s=0.06), STEP, BOUNDS, now_s)
        factors.append(round(sizing.factor, 3))
    assert factors == [0.833] * 5 + [0.694]


def test_a_ceiling_falls_at_once_and_rises_after_a_while() -> None:
    """Less is believed now; more when it could have been for three seconds without a break, and then the least of
    it."""
    ceiling = Ceiling().next(100, 0.0)
    assert ceiling.value == 100
    assert ceiling.next(95, 1.0).value == ceiling.next(105, 1.0).value == 100, "a little is nothing"
    assert ceiling.next(60, 1.0).value == 60
    assert Ceiling(9).next(8, 1.0).value == 9
    assert Ceiling(1).next(2, 1.0).next(2, 4.0).value == 2
    rising = ceiling
    for now_s, wanted in ((1.0, 300), (2.0, 200), (3.9, 250)):
        rising = rising.next(wanted, now_s)
        assert rising.value == 100
    assert rising.next(400, 4.0).value == 200
    broken = rising.next(100, 3.95)
    assert broken.next(400, 4.0).value == 100


@given(st.lists(st.integers(90, 110), min_size=1, max_size=50))
def test_noise_moves_no_ceiling(wanted: list[int]) -> None:
    """What stays within a tenth of the first leaves it."""
    ceiling = Ceiling(100)
    for now_s, one in enumerate(wanted):
        ceiling = ceiling.next(one, now_s)
    assert ceiling.value == 100


def test_a_target_that_cannot_be_kept_holds_nobody_up() -> None:
    """Where one request alone takes longer, the engine's own settings are the bounds; where it just fits, it is kept
    to, and what is on the border does not go to and fro."""
    alone_s = STEP.decode_s(1, 1000.0)
    hopeless = BatchSizing().next(seen(1, target_s=alone_s / 1.2), STEP, BOUNDS, 0.0)
    assert hopeless.hopeless
    assert (hopeless.tokens.value, hopeless.active.value) == (BOUNDS.tokens_most, BOUNDS.active_most)
    assert not BatchSizing().next(seen(1, target_s=alone_s / 1.05), STEP, BOUNDS, 0.0).hopeless
    assert hopeless.next(seen(1, target_s=alone_s / 1.05), STEP, BOUNDS, 1.0).hopeless
    assert not hopeless.next(seen(1, target_s=1.05 * alone_s), STEP, BOUNDS, 1.0).hopeless


def test_too_many_at_once_are_bounded_though_no_step_is_short_enough() -> None:
    """Twenty requests that decode too slowly together: prompts are not cut for them, but fewer run from now on."""
    crowd = BatchSizing().next(seen(20, target_s=0.015), STEP, BOUNDS, 0.0)
    assert crowd.hopeless and crowd.tokens.value == BOUNDS.tokens_most
    assert crowd.active.value == 8


def test_steps_are_long_enough_for_the_prompts_that_come() -> None:
    """Where short steps could not compute prompts as fast as they come, steps are as long as that takes; and where
    those who run would be late however prompts are cut, prompts are not held up."""
    idle = seen()
    few = BatchSizing().next(replace(idle, prompt_rate=1000.0), STEP, BOUNDS, 0.0)
    assert few.tokens.value == prompt_tokens_within(0.05, idle, STEP, BOUNDS)
    many = replace(seen(target_s=0.06), prompt_rate=11_000.0)
    steps = BatchSizing().next(many, STEP, BOUNDS, 0.0)
    tokens = steps.tokens.value - 20
    assert not steps.hopeless and tokens > prompt_tokens_within(0.06, many, STEP, BOUNDS)
    assert tokens / STEP.seconds(StepWork(20, 20_000.0, tokens)) > 11_000
    assert BatchSizing().next(replace(many, prompt_rate=15_000.0), STEP, BOUNDS, 0.0).hopeless


def test_a_prompt_in_a_hurry_makes_steps_longer() -> None:
    """While a prompt has waited for most of its TTFT target steps grow, though TPOT is late; afterwards they come back
    to the target."""
    late = seen(tpot_s=0.08)
    hurried = replace(late, ttft_share=0.8)
    sizing = BatchSizing()
    for now_s in range(10):
        sizing = sizing.next(hurried, STEP, BOUNDS, now_s)
    assert sizing.factor > 5
    assert sizing.tokens.value > 3 * prompt_tokens_within(0.05, late, STEP, BOUNDS)
    assert sizing.active.value == requests_within(0.05, late, STEP, BOUNDS), "decodes are in every step"
    sizing = sizing.next(seen(tpot_s=0.02), STEP, BOUNDS, 10)
    assert sizing.factor > 5, "little by little"
    for now_s in range(11, 100):
        sizing = sizing.next(seen(tpot_s=0.02), STEP, BOUNDS, now_s)
    assert sizing.factor == 1.0


def test_a_calm_time_is_no_reason_for_longer_steps() -> None:
    """TPOT far below its target brings a lowered goal back to the target, and never beyond."""
    sizing = BatchSizing(factor=0.4)
    for now_s in range(60):
        sizing = sizing.next(seen(tpot_s=0.01), STEP, BOUNDS, now_s)
        assert sizing.factor <= 1.0
    assert sizing.factor == 1.0


def test_who_is_late_gives_requests_away_where_there_is_room() -> None:
    """An eighth of them, and never most of what it can do; nobody's room, nothing to give away."""
    late = seen(running=16, tpot_s=0.06)
    assert BatchSizing().next(late, STEP, BOUNDS, 0.0).given.value > 16
    moved = BatchSizing().next(seen(20, 0.06, room_elsewhere=True), STEP, BOUNDS, 0.0)
    assert moved.given.value == 17 and moved.active.value > 20
    assert BatchSizing().next(seen(2, 0.06, room_elsewhere=True), STEP, BOUNDS, 0.0).given.value > 8
    assert BatchSizing().next(seen(16, 0.04, room_elsewhere=True), STEP, BOUNDS, 0.0).given.value > 16


@given(st.floats(0.3, 1.9), st.integers(0, 30))
def test_a_new_controller_goes_on_from_the_ceilings_at_work(factor: float, running: int) -> None:
    """With the ceilings that the replica has, the state is as it was: the next look changes nothing."""
    one = seen(running)
    tokens = prompt_tokens_within(factor * one.tpot_target_s, one, STEP, BOUNDS)
    active = requests_within(one.tpot_target_s, one, STEP, BOUNDS)
    following = resumed(tokens, active, one, STEP, BOUNDS).next(one, STEP, BOUNDS, 0.0)
    if tokens > BOUNDS.tokens_least + running:  # else the factor cannot be told from it
        assert (following.tokens.value, following.active.value) == (tokens, active)


def test_without_ceilings_a_new_controller_begins_anew() -> None:
    """A replica that never had a target gets its first one."""
    one = seen()
    assert resumed(0, 0, one, STEP, BOUNDS).next(one, STEP, BOUNDS, 0.0) == BatchSizing().next(one, STEP, BOUNDS, 0.0)
