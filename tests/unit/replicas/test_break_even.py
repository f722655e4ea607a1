"""Moving or computing again: what pays is done, what does not is tried rarely."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas.break_even import ENOUGH, LEARN_EVERY_S, PROBE_BLOCKS, PROBE_EVERY_S, BreakEven, Move, Rate

BLOCK_BYTES, BLOCK_TOKENS = 1000, 10


def policy(store_s: float | None, load_s: float | None, prefill_s: float | None) -> BreakEven:
    """A policy that has seen enough of each: seconds for one block; None is never seen."""
    even = BreakEven(BLOCK_BYTES, BLOCK_TOKENS)
    for _ in range(ENOUGH):
        if store_s is not None:
            even.observe_move(Move.STORE, BLOCK_BYTES, store_s)
        if load_s is not None:
            even.observe_move(Move.LOAD, BLOCK_BYTES, load_s)
        if prefill_s is not None:
            even.observe_prefill(BLOCK_TOKENS, prefill_s)
    return even


def test_what_pays_is_moved_without_bound() -> None:
    """Where a copy is faster than the prefill, all blocks move and are counted as moved."""
    even = policy(0.1, 0.1, 1.0)
    assert (even.grant(Move.STORE, 500, 0.0), even.grant(Move.LOAD, 500, 0.0)) == (500, 500)
    assert [(seen.moved, seen.probed, seen.declined) for seen in even.decisions.values()] == [(500, 0, 0)] * 2


def test_the_ratio_is_of_the_seconds_of_one_block() -> None:
    """A load is compared with the prefill of its tokens, a store is charged with the load that it is made for."""
    even = policy(0.3, 0.2, 1.0)
    assert even.cost_ratio(Move.LOAD) == pytest.approx(0.2)
    assert even.cost_ratio(Move.STORE) == pytest.approx(0.5)
    assert policy(0.3, None, 1.0).cost_ratio(Move.STORE) == pytest.approx(0.3)


@pytest.mark.parametrize("missing", ["load", "prefill"])
def test_the_unknown_is_tried_within_a_bound(missing: str) -> None:
    """Until a cost is known a probe's blocks may move, then no more before the next probe; all are counted."""
    even = policy(0.1, None if missing == "load" else 0.1, None if missing == "prefill" else 1.0)
    assert [even.grant(Move.LOAD, 5, 0.0) for _ in range(3)] == [5, PROBE_BLOCKS - 5, 0]
    assert even.grant(Move.LOAD, 5, LEARN_EVERY_S / 2) == 0
    assert even.grant(Move.LOAD, 100, LEARN_EVERY_S) == PROBE_BLOCKS
    seen = even.decisions[Move.LOAD]
    assert (seen.moved, seen.probed, seen.declined) == (0, 2 * PROBE_BLOCKS, 120 - 2 * PROBE_BLOCKS)


def test_too_few_observations_are_not_believed() -> None:
    """One lucky copy opens nothing; with ENOUGH of them the gate opens."""
    even = policy(None, None, 1.0)
    even.observe_move(Move.LOAD, BLOCK_BYTES, 0.01)
    assert even.cost_ratio(Move.LOAD) is None
    assert even.grant(Move.LOAD, 100, 0.0) == PROBE_BLOCKS
    for _ in range(ENOUGH - 1):
        even.observe_move(Move.LOAD, BLOCK_BYTES, 0.01)
    assert even.grant(Move.LOAD, 100, 0.0) == 100


def test_what_does_not_pay_is_switched_off_and_tried_rarely() -> None:
    """Where computing is faster, one probe in PROBE_EVERY_S is all that moves, in either direction."""
    even = policy(2.0, 2.0, 1.0)
    for move in Move:
        moved = sum(even.grant(move, 10, second * 1.0) for second in range(int(10 * PROBE_EVERY_S)))
        assert moved == 10 * PROBE_BLOCKS
        assert even.decisions[move].moved == 0


def test_it_switches_on_again_when_probes_show_that_it_pays() -> None:
    """Copies that have become fast turn the gate on, prefills that have become fast turn it off again."""
    even = policy(0.1, 2.0, 1.0)
    assert even.grant(Move.LOAD, 100, 0.0) == PROBE_BLOCKS
    for _ in range(30):
        even.observe_move(Move.LOAD, BLOCK_BYTES, 0.1)
    assert even.grant(Move.LOAD, 100, 1.0) == 100
    for _ in range(30):
        even.observe_prefill(BLOCK_TOKENS, 0.01)
    assert even.grant(Move.LOAD, 100, 2.0) == 0


def test_a_block_that_is_hardly_filled_is_computed_again() -> None:
    """It takes as long to move as a full one: where a full block takes a third of its prefill, one of ten tokens pays
    from four tokens on. What is declined is counted; while a cost is unknown any block is as good to learn it."""
    even = policy(None, 1 / 3, 1.0)
    assert [even.grant(Move.LOAD, 1, 0.0, tokens) for tokens in range(1, 7)] == [0, 0, 0, 1, 1, 1]
    seen = even.decisions[Move.LOAD]
    assert (seen.moved, seen.probed, seen.declined) == (3, 0, 3)
    assert policy(None, None, 1.0).grant(Move.LOAD, 1, 0.0, tokens=1) == 1
    assert policy(None, 2.0, 1.0).grant(Move.LOAD, 2 * PROBE_BLOCKS, 0.0, tokens=9) == PROBE_BLOCKS


def test_near_the_break_even_it_stays_as_it_is() -> None:
    """A ratio of 0.9 keeps a gate on that was on, and off that was off."""
    on, off = policy(None, 0.1, 1.0), policy(None, 2.0, 1.0)
    assert on.grant(Move.LOAD, 100, 0.0) == 100
    assert off.grant(Move.LOAD, 100, 0.0) == PROBE_BLOCKS
    for even in (on, off):
        for _ in range(60):
            even.observe_move(Move.LOAD, BLOCK_BYTES, 0.9)
    assert on.grant(Move.LOAD, 100, 1.0) == 100
    assert off.grant(Move.LOAD, 100, 1.0) == 0


def test_a_rate_weighs_seconds_and_forgets() -> None:
    """A long observation counts for more than a short one; old ones fade; empty ones say nothing."""
    rate = Rate()
    for units, seconds in ((1000.0, 10.0), (1.0, 0.001), (1000.0, 10.0), (0.0, 5.0), (5.0, 0.0)):
        rate.observe(units, seconds)
    assert rate.count == 3
    assert rate.per_s == pytest.approx(100.0, rel=0.01)
    for _ in range(40):
        rate.observe(7.0, 1.0)
    assert rate.per_s == pytest.approx(7.0, rel=0.05)


observations = st.tuples(st.sampled_from(["store", "load", "prefill"]), st.integers(1, 10**9), st.floats(1e-6, 1e3))


@given(
    st.lists(st.tuples(observations, st.sampled_from(list(Move)), st.integers(0, 50), st.floats(0, 20)), max_size=80)
)
def test_blocks_are_counted_and_losses_bounded(
    stream: list[tuple[tuple[str, int, float], Move, int, float]],
) -> None:
    """Whatever is observed: every block asked for is counted once, all or a probe is granted, what loses is never moved
    beyond its probes."""
    even, now, asked, granted = BreakEven(BLOCK_BYTES, BLOCK_TOKENS), 0.0, 0, 0
    for (what, units, seconds), move, blocks, wait_s in stream:
        now += wait_s
        if what == "prefill":
            even.observe_prefill(units, seconds)
        else:
            even.observe_move(Move(what), units, seconds)
        got = even.grant(move, blocks, now)
        ratio = even.cost_ratio(move)
        assert got <= blocks
        if ratio is None or ratio >= 1.0:
            assert got <= PROBE_BLOCKS
        elif ratio < 0.8:
            assert got == blocks
        asked, granted = asked + blocks, granted + got
    counts = even.decisions.values()
    assert sum(seen.moved + seen.probed for seen in counts) == granted
    assert sum(seen.declined for seen in counts) == asked - granted
    assert sum(seen.probed for seen in counts) <= 2 * PROBE_BLOCKS * (1 + now / LEARN_EVERY_S)
