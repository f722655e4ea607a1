"""ChunkPool: owners, limits, refusals, conservation."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from memory_agent.chunks import ChunkOwner, ChunkPool, PhysicalChunk
from memory_agent.errors import OutOfDeviceMemory, PoolExhausted, SettingsError
from memory_agent.fake_vmm import FakeVmm
from memory_agent.vmm import ContractViolation

CHUNK = 64
KV, ACT = ChunkOwner.KV_CACHE, ChunkOwner.ACTIVATION


def make_pool(limit_chunks: int = 8, capacity_chunks: int = 100) -> tuple[ChunkPool, FakeVmm]:
    vmm = FakeVmm(16, capacity_chunks * CHUNK)
    return ChunkPool(vmm, CHUNK, limit_chunks), vmm


def test_bytes_are_counted_by_owner() -> None:
    """Every owner's bytes are told apart, and given chunks count as FREE until they are trimmed."""
    pool, _ = make_pool()
    kv = pool.take(KV, 3)
    pool.take(ACT, 2)
    pool.give(KV, kv[:2])
    assert pool.bytes_by_owner() == {ChunkOwner.FREE: 2 * CHUNK, KV: CHUNK, ACT: 2 * CHUNK}
    assert pool.held_bytes == 5 * CHUNK
    pool.check_conservation()


def test_free_chunks_change_owner_without_the_system() -> None:
    """A chunk one owner gave is taken by the other before a new one is created."""
    pool, vmm = make_pool()
    given = pool.take(ACT, 2)
    pool.give(ACT, given)
    taken = pool.take(KV, 3)
    assert set(given) <= set(taken)
    assert vmm.plan.calls["create"] == 3


def test_more_than_the_limit_is_refused_whole() -> None:
    """A take beyond the limit raises PoolExhausted with both numbers and hands out nothing."""
    pool, vmm = make_pool(limit_chunks=4)
    pool.take(KV, 3)
    with pytest.raises(PoolExhausted) as caught:
        pool.take(ACT, 2)
    assert (caught.value.wanted_chunks, caught.value.available_chunks) == (2, 1)
    assert vmm.held_bytes() == 3 * CHUNK
    pool.check_conservation()


def test_a_limit_below_what_is_held_takes_effect_as_chunks_come_back() -> None:
    """A lowered limit takes nothing away, hands out nothing, and releases what is given above it at once."""
    pool, vmm = make_pool(limit_chunks=8)
    chunks = pool.take(KV, 8)
    pool.limit_chunks = 3
    assert pool.held_bytes == 8 * CHUNK
    with pytest.raises(PoolExhausted):
        pool.take(ACT, 1)
    pool.give(KV, chunks[:6])
    assert vmm.held_bytes() == 3 * CHUNK
    assert pool.bytes_by_owner() == {ChunkOwner.FREE: CHUNK, KV: 2 * CHUNK, ACT: 0}
    pool.take(ACT, 1)


def test_trim_keeps_what_it_is_told_to() -> None:
    """Trim releases FREE chunks down to keep_free and returns the bytes that are back with the system."""
    pool, vmm = make_pool()
    pool.give(KV, pool.take(KV, 6))
    assert pool.trim(keep_free=2) == 4 * CHUNK
    assert vmm.held_bytes() == 2 * CHUNK
    assert pool.trim() == 2 * CHUNK
    assert vmm.held_bytes() == 0


@pytest.mark.parametrize("nth", range(1, 5))
def test_a_refused_create_undoes_the_ones_before(nth: int) -> None:
    """Whichever create of a take is refused, the pool is as before: the FREE chunk still FREE, nothing new held."""
    pool, vmm = make_pool()
    pool.give(KV, pool.take(KV, 1))
    vmm.fail_at("create", nth)
    with pytest.raises(OutOfDeviceMemory):
        pool.take(KV, 5)
    assert pool.bytes_by_owner() == {ChunkOwner.FREE: CHUNK, KV: 0, ACT: 0}
    pool.check_conservation()
    assert len(pool.take(KV, 5)) == 5


def test_a_refused_undo_leaves_the_chunk_free() -> None:
    """When create is refused, then the release of its forerunner too, that one stays FREE and the pool consistent."""
    pool, vmm = make_pool()
    vmm.fail_at("create", 3)
    vmm.fail_at("release", 1)
    with pytest.raises(OutOfDeviceMemory, match="create"):
        pool.take(KV, 5)
    assert pool.bytes_by_owner()[ChunkOwner.FREE] == CHUNK
    pool.check_conservation()


@pytest.mark.parametrize("nth", range(1, 5))
def test_a_refused_release_holds_up_no_other(nth: int) -> None:
    """Whichever release of a trim is refused, all others go back, and the next trim takes the rest."""
    pool, vmm = make_pool()
    pool.give(KV, pool.take(KV, 4))
    vmm.fail_at("release", nth)
    with pytest.raises(OutOfDeviceMemory, match="release"):
        pool.trim()
    assert vmm.held_bytes() == pool.held_bytes == CHUNK
    pool.check_conservation()
    assert pool.trim() == CHUNK


def test_only_an_owner_gives_its_chunks_and_once() -> None:
    """Giving a stranger's chunk, a chunk twice, or a released one is a contract violation and moves nothing."""
    pool, _ = make_pool()
    kv, act = pool.take(KV, 2), pool.take(ACT, 1)
    for owner, chunks in ((KV, [kv[0], act[0]]), (KV, [kv[0], kv[0]]), (ChunkOwner.FREE, []), (ACT, kv)):
        if owner is ChunkOwner.FREE:
            chunks = kv
        with pytest.raises(ContractViolation):
            pool.give(owner, chunks)
    assert pool.bytes_by_owner() == {ChunkOwner.FREE: 0, KV: 2 * CHUNK, ACT: CHUNK}
    pool.give(KV, kv)
    pool.trim()
    with pytest.raises(ContractViolation):
        pool.give(KV, kv)


@pytest.mark.parametrize(("chunk_bytes", "limit"), [(0, 1), (-16, 1), (24, 1), (16, -1)])
def test_impossible_settings_are_refused(chunk_bytes: int, limit: int) -> None:
    """A chunk size that is no multiple of the granularity and a negative limit are settings errors."""
    with pytest.raises(SettingsError):
        ChunkPool(FakeVmm(16, 1600), chunk_bytes, limit)


def test_conservation_notices_memory_that_the_pool_does_not_know() -> None:
    """A chunk created behind the pool's back is found by the check."""
    pool, vmm = make_pool()
    pool.take(KV, 1)
    vmm.create(CHUNK)
    with pytest.raises(ContractViolation, match="the system 128"):
        pool.check_conservation()


class PoolMachine(RuleBasedStateMachine):
    """Random takes, gives, trims, limits and refusals, against a plain count of what each owner has."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.vmm = make_pool(limit_chunks=6, capacity_chunks=9)
        self.has: dict[ChunkOwner, list[PhysicalChunk]] = {KV: [], ACT: []}

    @rule(owner=st.sampled_from([KV, ACT]), count=st.integers(0, 8))
    def take(self, owner: ChunkOwner, count: int) -> None:
        """A take gives exactly ``count`` or nothing; PoolExhausted exactly when the limit leaves fewer."""
        in_use = sum(map(len, self.has.values()))
        try:
            chunks = self.pool.take(owner, count)
        except PoolExhausted:
            assert in_use + count > self.pool.limit_chunks
        except OutOfDeviceMemory:
            assert in_use + count <= self.pool.limit_chunks
        else:
            assert len(chunks) == count and (count == 0 or in_use + count <= self.pool.limit_chunks)
            self.has[owner] += chunks

    @rule(owner=st.sampled_from([KV, ACT]), count=st.integers(0, 8))
    def give(self, owner: ChunkOwner, count: int) -> None:
        given, self.has[owner] = self.has[owner][:count], self.has[owner][count:]
        self.pool.give(owner, given)

    @rule(keep=st.integers(0, 4))
    def trim(self, keep: int) -> None:
        held = self.vmm.held_bytes()
        try:
            assert self.pool.trim(keep) == held - self.vmm.held_bytes()
        except OutOfDeviceMemory:
            return
        assert self.pool.bytes_by_owner()[ChunkOwner.FREE] <= keep * CHUNK

    @rule(limit=st.integers(0, 9))
    def set_limit(self, limit: int) -> None:
        self.pool.limit_chunks = limit

    @rule(call=st.sampled_from(["create", "release"]), nth=st.integers(1, 4), times=st.integers(1, 3))
    def fail(self, call: str, nth: int, times: int) -> None:
        self.vmm.fail_at(call, nth, times)

    @invariant()
    def conserved(self) -> None:
        self.pool.check_conservation()
        counts = Counter({owner: len(chunks) * CHUNK for owner, chunks in self.has.items()})
        by_owner = self.pool.bytes_by_owner()
        assert all(by_owner[owner] == counts[owner] for owner in (KV, ACT))
        assert len({id(chunk) for chunks in self.has.values() for chunk in chunks}) == sum(map(len, self.has.values()))


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
