"""Parking: which extents a shrink takes, and that it leaves the rest of the prefix cache alone, on vLLM's pool."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from memory_agent.extents import ExtentMap, KvGeometry, KvRegion
from memory_agent.vmm import ContractViolation
from replicas.kv_parking import ExtentState, KvParking

TOKENS = 16
PAGE = 4096
EXTENTS = 8


class Cache:
    """A pool whose extents are all mapped, requests in it, and an own count of who was used when."""

    def __init__(self, run: int) -> None:
        init_none_hash(sha256)
        self._hasher: Callable[[Request], list[BlockHash]] = get_request_block_hasher(TOKENS, sha256)
        blocks = run * EXTENTS
        geometry = KvGeometry(blocks * PAGE, blocks, (KvRegion(0, 1, blocks * PAGE, PAGE, PAGE),))
        self.extents = ExtentMap(geometry, run * PAGE)
        self.pool = BlockPool(blocks, enable_caching=True, hash_block_size=TOKENS)
        self.parking = KvParking(self.pool, self.extents, range(EXTENTS))
        self.running: list[list[KVCacheBlock]] = []
        self.hashes: dict[int, BlockHash] = {}  # block -> what it caches
        self.freed_at: dict[int, int] = {}
        self.time = 0

    def start(self, blocks: int, full: int) -> None:
        """A request takes new blocks, of which it fills ``full``: these are cached."""
        blocks = min(blocks, self.pool.get_num_free_blocks())
        if not blocks:
            return
        self.time += 1
        ids = [self.time] * (blocks * TOKENS)
        request = Request(f"r{self.time}", ids, SamplingParams(max_tokens=1), None, block_hasher=self._hasher)
        taken = self.pool.get_new_blocks(blocks)
        for block in taken:
            self.hashes.pop(block.block_id, None)
        full = min(full, blocks)
        self.pool.cache_full_blocks(request, taken, 0, full, TOKENS, 0)
        for block, block_hash in zip(taken[:full], request.block_hashes, strict=False):
            self.hashes[block.block_id] = block_hash
        self.running.append(taken)

    def finish(self, index: int) -> None:
        """A request ends: its tail is the first to be evicted, as in vLLM."""
        blocks = self.running.pop(index % len(self.running))
        for block in reversed(blocks):
            self.time += 1
            self.freed_at[block.block_id] = self.time
        self.pool.free_blocks(reversed(blocks))

    def hit(self, block_id: int) -> None:
        """Another request finds a cached block and lets go of it again."""
        if block_id in self.hashes and self.is_free(block_id):
            self.running.append([self.pool.blocks[block_id]])
            self.pool.touch(self.running[-1])
            self.finish(len(self.running) - 1)

    def is_free(self, block_id: int) -> bool:
        return self.pool.blocks[block_id].ref_cnt == 0 and block_id != self.pool.null_block.block_id

    def free_extents(self) -> set[int]:
        return {extent for extent in range(EXTENTS) if all(map(self.is_free, self.extents.blocks_of(extent)))}

    def usefulness(self, extent: int) -> int:
        """When the newest of its cached blocks was let go; 0 where it caches nothing."""
        cached = [block for block in self.extents.blocks_of(extent) if block in self.hashes]
        return max((self.freed_at[block] for block in cached), default=0)

    def is_cached(self, block_hash: BlockHash) -> bool:
        return self.pool.get_cached_block(block_hash, [0]) is not None


actions = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.integers(1, 9), st.integers(0, 9)),
        st.tuples(st.just("finish"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("hit"), st.integers(1, 31), st.just(0)),
    ),
    max_size=30,
)


def played(run: int, steps: list[tuple[str, int, int]]) -> Cache:
    cache = Cache(run)
    for action, number, full in steps:
        if action == "start":
            cache.start(number, full)
        elif action == "hit":
            cache.hit(number)
        elif cache.running:
            cache.finish(number)
    return cache


@given(st.integers(1, 4), actions, st.integers(0, EXTENTS))
def test_a_shrink_takes_the_least_useful_whole_extents(run: int, steps: list[tuple[str, int, int]], count: int) -> None:
    """Only extents without a used block; those that cache nothing first, then the least recently used; no more than
    asked for and no fewer than there are."""
    cache = played(run, steps)
    free = cache.free_extents()
    useful = {extent: cache.usefulness(extent) for extent in free}
    victims = cache.parking.begin_unmap(count)
    assert set(victims) <= free
    assert len(victims) == len(set(victims)) == min(count, len(free))
    kept = [useful[extent] for extent in free - set(victims)]
    assert max((useful[extent] for extent in victims), default=0) <= min(kept, default=cache.time)
    cache.parking.check_conservation()


@given(st.integers(1, 4), actions, st.integers(0, EXTENTS))
def test_a_shrink_leaves_the_rest_of_the_prefix_cache(run: int, steps: list[tuple[str, int, int]], count: int) -> None:
    """Every cached block outside the victims is found afterwards, every one inside is not, and nothing that requests
    use has changed."""
    cache = played(run, steps)
    used = [(block.block_id, block.ref_cnt) for blocks in cache.running for block in blocks]
    victims = set(cache.parking.begin_unmap(count))
    for block, block_hash in cache.hashes.items():
        assert cache.is_cached(block_hash) == (cache.extents.extent_of(block) not in victims)
    assert [(block.block_id, block.ref_cnt) for blocks in cache.running for block in blocks] == used
    allocatable = {block.block_id for block in cache.pool.free_block_queue.get_all_free_blocks()}
    assert not allocatable & {block for extent in victims for block in cache.extents.blocks_of(extent)}


@given(st.integers(1, 4), actions, st.integers(1, EXTENTS))
def test_what_was_unmapped_comes_back_empty(run: int, steps: list[tuple[str, int, int]], count: int) -> None:
    """A round through all states gives the blocks back to vLLM, uncached."""
    cache = played(run, steps)
    free_blocks = cache.pool.get_num_free_blocks()
    victims = cache.parking.begin_unmap(count)
    cache.parking.finish_unmap(victims)
    assert cache.parking.count(ExtentState.PARKED) == len(victims)
    again = cache.parking.begin_map(EXTENTS)
    assert sorted(again) == sorted(victims)
    cache.parking.finish_map(again)
    assert cache.pool.get_num_free_blocks() == free_blocks
    assert all(cache.pool.blocks[b].block_hash is None for e in victims for b in cache.extents.blocks_of(e))
    cache.parking.check_conservation()


def test_a_free_block_without_memory_is_found_by_the_check() -> None:
    """The check of the books can fail: a parked block that somebody has let go of."""
    cache = Cache(run=1)
    [victim] = cache.parking.begin_unmap(1)
    cache.pool.free_blocks([cache.pool.blocks[victim]])
    with pytest.raises(ContractViolation, match=f"free block {victim} is in a unmapping extent"):
        cache.parking.check_conservation()
