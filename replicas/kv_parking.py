"""Which KV blocks vLLM may use: the blocks of mapped extents; all others are parked outside its free queue.

    extent   PARKED --begin_map--> MAPPING --finish_map--> MAPPED --begin_unmap--> UNMAPPING --finish_unmap--> PARKED
                       (abort_map: to UNMAPPING)

Invariant: every block in vLLM's free queue belongs to a MAPPED extent. A parked block is one this module holds a
reference to, taken through the pool's public methods (``touch``, ``free_blocks``, ``evict_blocks``).
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from memory_agent.extents import ExtentMap
from memory_agent.vmm import ContractViolation


class ExtentState(Enum):
    PARKED = "parked"
    MAPPING = "mapping"
    MAPPED = "mapped"
    UNMAPPING = "unmapping"


class KvParking:
    """Extent states over one vLLM BlockPool.

    Args:
        pool: a pool of which nothing has been allocated yet.
        mapped: extents that every rank has mapped already; the one of the pool's null block must be among them.
        on_evict: told each block that is about to lose its memory, with its content.
    """

    def __init__(
        self,
        pool: BlockPool,
        extents: ExtentMap,
        mapped: Iterable[int],
        on_evict: Callable[[KVCacheBlock], None] | None = None,
    ) -> None:
        self._pool = pool
        self._on_evict = on_evict
        self._extents = extents
        mapped = set(mapped)
        assert extents.extent_of(pool.null_block.block_id) in mapped, "the null block has no memory"
        self._state = [ExtentState.MAPPED if e in mapped else ExtentState.PARKED for e in range(extents.count)]
        self._count = {state: self._state.count(state) for state in ExtentState}
        self._parked_heap = [e for e in range(extents.count) if e not in mapped]
        for extent in self._parked_heap:
            pool.touch(self._blocks(extent))

    def count(self, state: ExtentState) -> int:
        return self._count[state]

    @property
    def mapped_blocks(self) -> int:
        """Blocks of MAPPED extents, the null block among them."""
        blocks = self._count[ExtentState.MAPPED] * self._extents.blocks_per_extent
        last = self._extents.count - 1
        if self._state[last] is ExtentState.MAPPED:
            blocks -= self._extents.blocks_per_extent - len(self._extents.blocks_of(last))
        return blocks

    @property
    def used_blocks(self) -> int:
        """Blocks that requests (or vLLM itself, for the null block not counted) reference now."""
        return max(0, self.mapped_blocks - self._pool.get_num_free_blocks() - 1)

    def has_free_extent_beyond(self, count: int) -> bool:
        """True when more than ``count`` extents are mapped and one of them could be unmapped now."""
        return self._count[ExtentState.MAPPED] > count and next(self._free_extents(), None) is not None

    def begin_map(self, count: int) -> list[int]:
        """Up to ``count`` parked extents, lowest first (neighbours merge into one kernel mapping), now MAPPING."""
        chosen: list[int] = []
        while self._parked_heap and len(chosen) < count:
            extent = heapq.heappop(self._parked_heap)
            self._move(extent, ExtentState.PARKED, ExtentState.MAPPING)
            chosen.append(extent)
        return chosen

    def finish_map(self, extents: Iterable[int]) -> None:
        """Every rank has mapped them: their blocks are vLLM's from now on."""
        for extent in extents:
            self._move(extent, ExtentState.MAPPING, ExtentState.MAPPED)
            self._pool.free_blocks(self._blocks(extent))

    def abort_map(self, extents: Iterable[int]) -> None:
        """A rank could not map them: to be unmapped again on the ranks that did."""
        for extent in extents:
            self._move(extent, ExtentState.MAPPING, ExtentState.UNMAPPING)

    def begin_unmap(self, count: int) -> list[int]:
        """Up to ``count`` extents without a used block, now UNMAPPING and out of vLLM's reach.

        Extents that hold nothing go first, then the ones whose cached blocks were least recently used.
        """
        chosen = [extent for _, extent in heapq.nsmallest(count, self._free_extents())] if count > 0 else []
        for extent in chosen:
            blocks = self._blocks(extent)
            if self._on_evict is not None:
                for block in blocks:
                    self._on_evict(block)
            self._pool.evict_blocks({block.block_id for block in blocks})
            self._pool.touch(blocks)
            self._move(extent, ExtentState.MAPPED, ExtentState.UNMAPPING)
        return chosen

    def finish_unmap(self, extents: Iterable[int]) -> None:
        for extent in extents:
            self._move(extent, ExtentState.UNMAPPING, ExtentState.PARKED)
            heapq.heappush(self._parked_heap, extent)

    @contextmanager
    def all_in_pool(self) -> Iterator[None]:
        """Lend every parked block to the pool for a moment, for operations of vLLM that insist on an unused pool.
        Nothing may be allocated meanwhile."""
        held = [
            block
            for extent, state in enumerate(self._state)
            if state is not ExtentState.MAPPED
            for block in self._blocks(extent)
        ]
        self._pool.free_blocks(held)
        try:
            yield
        finally:
            self._pool.touch(held)

    def check_conservation(self) -> None:
        """Raise ContractViolation unless every block in the free queue is mapped and every parked block is held."""
        for block in self._pool.free_block_queue.get_all_free_blocks():
            state = self._state[self._extents.extent_of(block.block_id)]
            if state is not ExtentState.MAPPED:
                raise ContractViolation(f"free block {block.block_id} is in a {state.value} extent")
        for state in ExtentState:
            if self._count[state] != self._state.count(state):
                raise ContractViolation(
                    f"{self._state.count(state)} extents are {state.value}, {self._count[state]} are counted"
                )
        for extent, state in enumerate(self._state):
            if state is not ExtentState.MAPPED and any(block.ref_cnt == 0 for block in self._blocks(extent)):
                raise ContractViolation(f"{state.value} extent {extent} has a block that is not held")

    def _free_extents(self) -> Iterator[tuple[tuple[int, int], int]]:
        """((cached blocks?, recency of its most recently used block), extent) of each extent that is wholly free."""
        free: dict[int, list[int]] = {}
        for recency, block in enumerate(self._pool.free_block_queue.get_all_free_blocks()):
            entry = free.setdefault(self._extents.extent_of(block.block_id), [0, 0, 0])
            entry[0] += 1
            entry[1] |= block.block_hash is not None
            entry[2] = recency
        for extent, (count, cached, recency) in free.items():
            if count == len(self._extents.blocks_of(extent)):
                yield (cached, recency), extent

    def _blocks(self, extent: int) -> list[KVCacheBlock]:
        return [self._pool.blocks[block_id] for block_id in self._extents.blocks_of(extent)]

    def _move(self, extent: int, old: ExtentState, new: ExtentState) -> None:
        assert self._state[extent] is old, f"extent {extent} is {self._state[extent].value}, not {old.value}"
        self._state[extent] = new
        self._count[old] -= 1
        self._count[new] += 1
