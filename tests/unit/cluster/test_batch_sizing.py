"""How large steps and batches may be."""

import math

from hypothesis import given
from hypothesis import strategies as st

from cluster.batch_sizing import (
    BatchBounds,
    BatchObservation,
    BatchSizing,
    prompt_tokens_within,
    requests_within,
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
)


def seen(running: int = 20, tpot_s: float = math.nan, target_s: float = 0.05) -> BatchObservation:
    return BatchObservation(running, running * 1000.0, tpot_s, target_s)


@given(st.lists(observations, min_size=1, max_size=30))
def test_bounds_are_kept_whatever_is_seen(looks: list[BatchObservation]) -> None:
    """At least one request and a few tokens, at most what the engine can do; revisions never fall."""
    sizing = BatchSizing()
    for one in looks:
        following = sizing.next(one, STEP, BOUNDS)
        assert following.target.revision >= sizing.target.revision
        assert 1 <= following.target.active_max <= BOUNDS.active_most
        assert BOUNDS.tokens_least <= following.target.token_budget_max <= BOUNDS.tokens_most
        sizing = following


@given(observations, st.floats(1e-3, 1), st.floats(1, 5))
def test_a_tighter_goal_never_allows_more(one: BatchObservation, goal_s: float, wider: float) -> None:
    """Feed forward is monotone in the goal."""
    assert prompt_tokens_within(goal_s, one, STEP, BOUNDS) <= prompt_tokens_within(wider * goal_s, one, STEP, BOUNDS)
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
    on
    falling."""
    sizing = BatchSizing()
    for _ in range(60):
        sizing = sizing.next(seen(), STEP, BOUNDS)
        target = sizing.target
        real_s = 1.5 * STEP.seconds(StepWork(20, 20_000.0, target.token_budget_max - 20))
        sizing = sizing.next(seen(tpot_s=real_s), STEP, BOUNDS)
    assert 0.8 * 0.05 < real_s <= 1.1 * 0.05


def test_nothing_new_is_no_new_revision() -> None:
    """The same look again leaves the target as it is, and small changes too."""
    sizing = BatchSizing().next(seen(), STEP, BOUNDS)
    assert sizing.target.revision == 1
    assert sizing.next(seen(), STEP, BOUNDS).target is sizing.target
    assert sizing.next(seen(running=21), STEP, BOUNDS).target is sizing.target
