"""KV blocks that leave the device and come back, against a real vLLM block pool and real segments."""

import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

from memory_agent.extents import KvGeometry, KvRegion
from memory_agent.host_segment import HostSegment
from memory_agent.lease_board import EngineWord, LeaseBoard
from replicas.break_even import Move
from replicas.host_copies import HostCopies
from replicas.host_moves import HostCopy, HostReport, HostWork
from replicas.host_tier import HostTier
from replicas.host_traffic import HostTraffic
from replicas.kv_blocks import HostBlocks

BLOCKS, SLOTS, TOKENS, WORDS = 9, 6, 16, 8
FINGERPRINT = b"f" * 32
GEOMETRY = KvGeometry(BLOCKS * WORDS * 8, BLOCKS, (KvRegion(0, 1, BLOCKS * WORDS * 8, WORDS * 8, WORDS * 8),))


class World:
    """A device of eight usable blocks on each rank, whose content is its hash, and a host buffer of six slots."""

    def __init__(self, folder: Path, ranks: int = 1, pays: bool = True) -> None:
        self.pool = BlockPool(BLOCKS, enable_caching=True, hash_block_size=TOKENS)
        self.now = 0.0
        self.damaged = 0
        block_bytes = WORDS * 8
        self.traffic = HostTraffic(SLOTS, block_bytes, TOKENS, ranks, clock=lambda: self.now)
        self.buffer = self.traffic.buffer
        self.tier = HostTier(self.traffic, self.pool, TOKENS, FINGERPRINT)
        self.device = [np.zeros((1, BLOCKS, WORDS), np.uint64) for _ in range(ranks)]
        self.segments = [HostSegment.create(folder / f"{r}", block_bytes, SLOTS, FINGERPRINT) for r in range(ranks)]
        self.copies = [
            HostCopies(segment, HostBlocks(device.view(np.uint8).ravel(), GEOMETRY))
            for segment, device in zip(self.segments, self.device, strict=True)
        ]
        for _ in range(3):
            self.traffic.break_even.observe_move(Move.STORE, block_bytes, 1e-6 if pays else 1.0)
            self.traffic.break_even.observe_move(Move.LOAD, block_bytes, 1e-6 if pays else 1.0)
            self.traffic.break_even.observe_prefill(TOKENS, 1e-3)

    def run(self, name: str, blocks: int) -> int:
        """One request of so many full blocks and a token, from start to end in one step; returns its loaded blocks."""
        hashes = [BlockHash(f"{name}-{i}".encode().ljust(32)) for i in range(blocks)]
        self.tier.watch(blocks)
        here = []
        for block_hash in hashes:
            cached = self.pool.get_cached_block(block_hash, [0])
            if not cached:
                break
            here += cached
        self.pool.touch(here)
        matched = self.tier.match(name, hashes, len(here) * TOKENS, blocks * TOKENS + 1)
        table = here + self.pool.get_new_blocks(blocks - len(here))
        self.tier.allocate(name, [block.block_id for block in table], matched)
        request = SimpleNamespace(block_hashes=hashes)
        self.pool.cache_full_blocks(request, table, len(here), blocks, TOKENS, 0)  # type: ignore[arg-type]
        self.work()
        damaged = set().union(*(copies.take_invalid_blocks() for copies in self.copies))
        self.damaged += len(damaged)
        self.compute(table, hashes, len(here) + matched // TOKENS, damaged)
        self.pool.free_blocks(reversed(table))
        self.tier.forget(name)
        return matched // TOKENS

    def work(self) -> None:
        """The step's copies on every rank, and their answers."""
        self.tier.end_step()
        work = self.traffic.take()
        for copies in self.copies:
            copies.store(work)
        for copies in self.copies:
            copies.load(work)
        reports = [copies.finish() for copies in self.copies]
        self.traffic.on_reports([report for report in reports if report is not None])

    def compute(self, table: list[KVCacheBlock], hashes: list[BlockHash], present: int, damaged: set[int]) -> None:
        """What is said to be on the device is there; the rest is computed now."""
        for i, (block, block_hash) in enumerate(zip(table, hashes, strict=True)):
            for rank, device in enumerate(self.device):
                content = np.frombuffer(block_hash[:24].ljust(WORDS * 8, bytes([rank])), np.uint64)
                if i < present and block.block_id not in damaged:
                    assert np.array_equal(device[0, block.block_id], content), f"{block_hash!r} is not on rank {rank}"
                device[0, block.block_id] = content

    def close(self) -> None:
        for segment in self.segments:
            segment.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def test_an_evicted_prefix_comes_back_by_loading(world: World) -> None:
    """What another request has pushed out is not computed again, and holds what it held."""
    assert world.run("a", 4) == 0
    assert world.run("b", 8) == 0
    assert world.run("a", 4) == 4
    assert world.buffer.counts.stores >= 4
    world.buffer.check_conservation()


def test_what_is_still_on_the_device_is_not_loaded(world: World) -> None:
    """Blocks leave from the end of a prefix on: the first two of four are still there."""
    world.run("a", 4)
    world.run("b", 6)
    assert world.run("a", 4) == 2


def test_blocks_of_an_unmapped_extent_are_kept(world: World) -> None:
    """The memory under them goes after the copy."""
    world.run("a", 2)
    for block in world.pool.blocks[1:]:
        world.tier.evict(block)
    world.pool.evict_blocks({block.block_id for block in world.pool.blocks[1:]})
    world.work()
    world.device[0][:] = 0
    assert world.run("a", 2) == 2


def test_a_damaged_block_is_computed_again(world: World) -> None:
    """The request's device blocks are reported, the block is forgotten and counted, and nothing stays pinned."""
    world.run("a", 4)
    world.run("b", 8)
    with world.segments[0].path.open("r+b") as file:
        file.seek(-SLOTS * mmap.PAGESIZE, os.SEEK_END)
        file.write(b"\xff" * WORDS)  # of the first slot
    assert world.run("a", 4) == 4
    assert world.damaged == 1
    assert world.buffer.counts.discarded == 1
    world.buffer.check_conservation()
    assert world.buffer.taken_slots == len(world.segments[0].scan()) - 1  # its bytes go with the next step


def test_a_resumed_request_finds_what_leaves_in_this_very_step(world: World) -> None:
    """Blocks that vLLM has just handed out, or that lose their memory, are on their way to the host buffer: a request
    that was preempted has them loaded from there, others do not rely on it."""
    hashes = [BlockHash(f"a-{i}".encode().ljust(32)) for i in range(4)]
    world.run("a", 4)
    world.tier.watch(BLOCKS)
    handed_out, unmapped = ([world.pool.get_cached_block(one, [0])[0] for one in hashes[at : at + 2]] for at in (0, 2))  # type: ignore[index]
    for block in unmapped:
        world.tier.evict(block)
    world.pool.evict_blocks({block.block_id for block in handed_out + unmapped})
    assert world.tier.match("new", hashes, 0, 4 * TOKENS + 1) == 0
    assert world.tier.match("a", hashes, 0, 4 * TOKENS + 1, resumed=True) == 4 * TOKENS
    world.tier.allocate("a", [5, 6, 7, 8], 4 * TOKENS)
    world.work()
    assert np.array_equal(world.device[0][:, 1:5], world.device[0][:, 5:9])


@pytest.mark.parametrize("pays", [True, False])
def test_the_board_tells_what_the_buffer_did(tmp_path: Path, pays: bool) -> None:
    """Its size, what was found in it, and what break-even has decided about stores and loads."""
    world = World(tmp_path, pays=pays)
    for name, blocks in (("a", 4), ("b", 8), ("a", 4), ("b", 8), ("c", 8), ("d", 8)):
        world.run(name, blocks)
        world.now += 0.1
    row = LeaseBoard.create(tmp_path / "board", 1).row(0)
    world.traffic.publish(row)
    word, decisions = row.get, world.traffic.break_even.decisions
    assert word(EngineWord.HOST_CAPACITY_BYTES) == SLOTS * WORDS * 8
    assert word(EngineWord.HOST_HITS) > 0 < word(EngineWord.HOST_MISSES)
    assert (word(EngineWord.HOST_STORES_MOVED) > 0) == pays
    assert (word(EngineWord.HOST_LOADS_MOVED) > 0) == pays
    assert (word(EngineWord.HOST_STORES_PROBED) > 0) == (word(EngineWord.HOST_STORES_DECLINED) > 0) == (not pays)
    assert word(EngineWord.HOST_LOADS_PROBED) == decisions[Move.LOAD].probed
    assert word(EngineWord.HOST_LOADS_DECLINED) == decisions[Move.LOAD].declined
    world.close()


def test_what_is_disbelieved_is_not_kept(world: World) -> None:
    """Blocks that turn out wrong are found by nobody, and go nowhere, though they were watched."""
    world.run("a", 4)
    world.tier.watch(BLOCKS)
    world.tier.disbelieve(range(1, 3))
    assert world.run("a", 4) == 0
    assert world.buffer.taken_slots == 0


def test_a_block_that_could_not_be_loaded_holds_zeros(world: World) -> None:
    """What was read of a damaged one may be NaN, which whoever gets the block next would compute with."""
    key, copies, device = b"k" * 32, world.copies[0], world.device[0]
    device[:, 2] = 7
    copies.store(HostWork(1, store=[HostCopy(0, 2, key)]))
    with world.segments[0].path.open("r+b") as file:
        file.seek(-SLOTS * mmap.PAGESIZE, os.SEEK_END)
        file.write(b"\xff" * 8)  # of the first slot
    copies.load(HostWork(2, load=[HostCopy(0, 3, key)]))
    assert copies.take_invalid_blocks() == {3}
    assert not device[:, 3].any()


def test_a_block_counts_when_every_rank_has_stored_it(tmp_path: Path) -> None:
    """A rank without memory makes the store fail on all; nothing is loaded that one of them lacks."""
    world = World(tmp_path, ranks=2)
    world.run("a", 4)
    world.tier.watch(BLOCKS)
    world.pool.evict_blocks({1, 2, 3, 4})
    world.tier.end_step()
    work = world.traffic.take()
    stored = [copy.key for copy in work.store]
    world.traffic.on_reports([HostReport(work.sequence)])
    assert world.buffer.match_prefix(stored) == 0
    world.traffic.on_reports([HostReport(work.sequence, unstored=stored[1:])])
    assert [world.buffer.match_prefix([key]) for key in stored] == [1, 0, 0, 0]
    world.buffer.check_conservation()
    world.close()


def test_blocks_are_left_where_computing_is_cheaper(tmp_path: Path) -> None:
    """But for a probe now and then; what was declined is counted."""
    world = World(tmp_path, pays=False)
    for name in "abcdef":
        world.run(name, 8)
    assert world.traffic.break_even.decisions[Move.STORE].declined > 20
    assert world.buffer.counts.stores <= 8
    world.close()


def test_after_a_reset_nothing_is_loaded(world: World) -> None:
    """New weights make other KV of the same tokens."""
    world.run("a", 4)
    world.run("b", 8)
    world.tier.clear()
    world.buffer.clear()
    assert world.run("a", 4) == 0


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 2), st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 8)), max_size=25))
def test_whatever_is_loaded_is_what_was_stored(ranks: int, requests: list[tuple[str, int]]) -> None:
    """Along any sequence of requests every block that is not computed holds what was computed for it, on every rank."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), ranks)
        for name, blocks in requests:
            world.run(name, blocks)
            world.now += 0.1
            world.buffer.check_conservation()
        world.close()
