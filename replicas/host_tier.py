"""The scheduler's side of the host buffer: KV blocks that leave the device go there, and come back by loading.

A block leaves when vLLM hands its place to another request, or when its extent is unmapped. That includes the blocks of
a preempted request: it resumes with what is still on the device, then with what the host buffer has, and computes the
rest, at least its last, partly filled block.

One step:  watch (what may be evicted now) -> vLLM schedules: match, allocate -> take (rides with the step)
           -> the workers store, unmap, map, load, run the forward -> on_reports
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashWithGroupId, KVCacheBlock, get_block_hash

from memory_agent.host_buffer import HostBuffer
from memory_agent.kv_fingerprint import block_key
from memory_agent.lease_board import EngineWord, Row
from replicas.break_even import BreakEven, Move
from replicas.host_moves import HostCopy, HostReport, HostWork
from replicas.vllm_adapter import free_blocks

logger = logging.getLogger(__name__)

_MOSTLY_PREFILL = 8
"""A step with this many times more tokens than requests says how fast prefill is."""


class HostTier:
    """Lives in the scheduler's process; not thread-safe.

    Args:
        pool: vLLM's blocks, of one KV cache group.
        slots: slots of each rank's segment. block_bytes: of a block on one rank. block_tokens: tokens of a block.
        fingerprint: says, with a block's hash, what its bytes are; 32 bytes.
        ranks: workers that copy.
    """

    def __init__(
        self,
        pool: BlockPool,
        slots: int,
        block_bytes: int,
        block_tokens: int,
        fingerprint: bytes,
        ranks: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.buffer = HostBuffer(slots, slots)
        self.break_even = BreakEven(block_bytes, block_tokens)
        self._pool = pool
        self._block_bytes = block_bytes
        self._block_tokens = block_tokens
        self._fingerprint = fingerprint
        self._ranks = ranks
        self._clock = clock
        self._watched: list[tuple[KVCacheBlock, BlockHashWithGroupId]] = []
        self._evicted: dict[bytes, int] = {}
        self._matches: dict[str, tuple[int, list[bytes]]] = {}
        self._loads: list[HostCopy] = []
        self._flights: dict[int, tuple[HostWork, list[HostReport]]] = {}
        self._sequence = 0
        self._loaded = 0

    # -- a step -------------------------------------------------------------------------------------------------------

    def evict(self, block: KVCacheBlock) -> None:
        """This block is about to lose its content, which lasts until the workers' part of the coming step."""
        if block.block_hash is not None:
            self._evicted[self._key(get_block_hash(block.block_hash))] = block.block_id

    def watch(self, blocks: int) -> None:
        """vLLM is about to allocate up to ``blocks`` blocks: remember what they hold now."""
        self._watched = [
            (block, block.block_hash)
            for block in islice(free_blocks(self._pool), blocks)
            if block.block_hash is not None
        ]

    def match(self, request_id: str, hashes: Sequence[BlockHash], computed_tokens: int, tokens: int) -> int:
        """Tokens of the request, after the ``computed_tokens`` that the device has, that are to be loaded.

        Args:
            hashes: of the request's full blocks, from its first on.
            tokens: of the request now; at least the last one is computed.
        """
        first, last = computed_tokens // self._block_tokens, (tokens - 1) // self._block_tokens
        keys = [self._key(block_hash) for block_hash in hashes[first:last]]
        asked_from, granted = self._matches.get(request_id, (first, None))
        found = self.buffer.match_prefix(keys, again=granted is not None)
        if granted is None or asked_from != first:
            granted = []
        # vLLM asks again in each step until it has memory for the request: what was decided stays decided.
        more = self.break_even.grant(Move.LOAD, found - len(granted), self._clock()) if found > len(granted) else 0
        keys = keys[: min(found, len(granted) + more)]
        self._matches[request_id] = (first, keys)
        return len(keys) * self._block_tokens

    def allocate(self, request_id: str, block_ids: Sequence[int], loaded_tokens: int) -> None:
        """vLLM has given the request these blocks, and expects ``loaded_tokens`` tokens in them to be loaded."""
        first, keys = self._matches.pop(request_id, (0, []))
        if not loaded_tokens:
            return
        keys = keys[: loaded_tokens // self._block_tokens]
        slots = self.buffer.pin(keys)
        self._loads += [
            HostCopy(slot, block_id, key) for slot, block_id, key in zip(slots, block_ids[first:], keys, strict=False)
        ]

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._matches.pop(request_id, None)

    def take(self) -> HostWork:
        """The copies of this step; they are in flight until every rank has answered."""
        for block, block_hash in self._watched:
            if block.block_hash != block_hash:
                self._evicted[self._key(get_block_hash(block_hash))] = block.block_id
        new = [key for key in self._evicted if key not in self.buffer]
        granted = new[: self.break_even.grant(Move.STORE, len(new), self._clock())] if new else []
        stores = [HostCopy(slot, self._evicted[key], key) for key, slot in self.buffer.begin_store(granted)]
        work = HostWork(release=self.buffer.freed_slots(), store=stores, load=self._loads)
        self._watched, self._evicted, self._loads = [], {}, []
        if work.release or work.store or work.load:
            self._sequence += 1
            work.sequence = self._sequence
            self._flights[work.sequence] = (work, [])
        return work

    def on_reports(self, reports: Iterable[HostReport]) -> None:
        """Answers of workers; a copy counts when all ranks have answered."""
        for report in reports:
            self._learn(report)
            flight = self._flights.get(report.sequence)
            if flight is None:
                continue
            work, answers = flight
            answers.append(report)
            if len(answers) == self._ranks:
                del self._flights[report.sequence]
                self._finish(work, answers)

    @property
    def busy(self) -> bool:
        """Copies are in flight."""
        return bool(self._flights)

    def clear(self) -> None:
        """Forget every stored block: the same tokens would have other KV from now on."""
        self.buffer.clear()
        self._matches.clear()

    def publish(self, row: Row) -> None:
        """This engine's words about its host buffer."""
        counts, loads = self.buffer.counts, self.break_even.decisions[Move.LOAD]
        stores = self.break_even.decisions[Move.STORE]
        row.set(EngineWord.HOST_BYTES, self.buffer.taken_slots * self._block_bytes * self._ranks)
        row.set(EngineWord.HOST_STORED_BLOCKS, counts.stores)
        row.set(EngineWord.HOST_LOADED_BLOCKS, self._loaded)
        row.set(EngineWord.HOST_DECLINED_BLOCKS, loads.declined + stores.declined)
        row.set(EngineWord.HOST_EVICTED_BLOCKS, counts.evictions)
        row.set(EngineWord.HOST_DAMAGED_BLOCKS, counts.discarded)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _key(self, block_hash: BlockHash) -> bytes:
        return block_key(self._fingerprint, block_hash)

    def _learn(self, report: HostReport) -> None:
        self.break_even.observe_move(Move.STORE, report.stored_bytes, report.store_s)
        self.break_even.observe_move(Move.LOAD, report.loaded_bytes, report.load_s)
        if report.forward_tokens > _MOSTLY_PREFILL * report.forward_rows:
            self.break_even.observe_prefill(report.forward_tokens, report.forward_s)

    def _finish(self, work: HostWork, answers: Sequence[HostReport]) -> None:
        unstored = {key for answer in answers for key in answer.unstored}
        self.buffer.abort_store([copy.key for copy in work.store if copy.key in unstored])
        self.buffer.finish_store([copy.key for copy in work.store if copy.key not in unstored])
        unloaded = {key for answer in answers for key in answer.unloaded}
        if unloaded:
            logger.warning("%d KV blocks of the host buffer are damaged: they are computed again", len(unloaded))
            self.buffer.discard(unloaded)
        for copy in work.load:
            self.buffer.unpin([copy.key])
        self._loaded += len(work.load) - sum(copy.key in unloaded for copy in work.load)
