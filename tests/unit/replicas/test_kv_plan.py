"""The plan of one step: obey the lease, follow demand, give back when idle."""

from hypothesis import given
from hypothesis import strategies as st

from replicas.kv_plan import KvGroup, KvState, blocks_ahead, plan_moves

extents = st.integers(0, 50)
limits = st.tuples(extents, extents).map(sorted)


@st.composite
def states(draw: st.DrawFn) -> KvState:
    soft_limit, limit = draw(limits)
    return KvState(
        limit=limit,
        soft_limit=soft_limit,
        mapped=draw(extents),
        mapping=draw(extents),
        unmapping=draw(extents),
        wanted=draw(extents),
        rest=draw(st.integers(1, 10)),
        idle=draw(st.booleans()),
        batch=draw(st.integers(0, 20)),
    )


@given(states())
def test_a_plan_never_holds_more_than_the_lease(state: KvState) -> None:
    """Growing stops where the step's activations begin, counting what is still being unmapped."""
    plan = plan_moves(state)
    if plan.grow:
        assert state.committed + plan.grow <= state.soft_limit


@given(states())
def test_a_lease_below_what_is_held_is_obeyed_at_once(state: KvState) -> None:
    """Whatever is held above the limit goes by force; what the step's activations need, only where it is free."""
    plan = plan_moves(state)
    held = state.mapped + state.mapping
    assert plan.forced == max(0, held - state.limit)
    if held > state.soft_limit:
        assert plan.shrink == held - state.soft_limit


@given(states())
def test_a_plan_never_grows_and_shrinks_at_once(state: KvState) -> None:
    """A step moves memory one way."""
    plan = plan_moves(state)
    assert plan.grow == 0 or plan.shrink == 0
    assert plan.grow >= 0
    assert plan.shrink >= 0


def test_demand_is_met_batch_by_batch() -> None:
    """A large demand is mapped in batches, so that no step is held up for long."""
    state = KvState(
        limit=100, soft_limit=100, mapped=4, mapping=0, unmapping=0, wanted=60, rest=4, idle=False, batch=16
    )
    assert plan_moves(state).grow == 16


def test_an_idle_engine_shrinks_to_its_rest() -> None:
    """Idleness gives back everything above the rest, without force."""
    state = KvState(limit=100, soft_limit=100, mapped=40, mapping=0, unmapping=0, wanted=1, rest=4, idle=True, batch=16)
    assert (plan_moves(state).shrink, plan_moves(state).forced) == (36, 0)


ONE_GROUP = (KvGroup(block_tokens=128, most_blocks=100),)


def test_the_next_block_is_wanted_before_the_last_one_is_full() -> None:
    """With 16 tokens of lookahead a request wants its next block from token 113 of 128 on."""
    assert blocks_ahead(ONE_GROUP, tokens=112, computed_tokens=111, lookahead_tokens=16) == 0
    assert blocks_ahead(ONE_GROUP, tokens=113, computed_tokens=112, lookahead_tokens=16) == 1


def test_a_prefill_wants_all_its_blocks() -> None:
    """A prompt of which 256 of 1,000 tokens are computed wants the blocks of the rest."""
    assert blocks_ahead(ONE_GROUP, tokens=1000, computed_tokens=256, lookahead_tokens=16) == 6


def test_every_group_wants_blocks_of_its_own() -> None:
    """Each cache group has a table for the request; one that looks back a window only never wants more than that."""
    windowed = KvGroup(block_tokens=64, most_blocks=3)
    assert blocks_ahead((*ONE_GROUP, windowed), tokens=1000, computed_tokens=0, lookahead_tokens=16) == 8 + 3
    assert blocks_ahead((*ONE_GROUP, windowed), tokens=1009, computed_tokens=1008, lookahead_tokens=16) == 1 + 1
