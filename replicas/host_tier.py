"""Full KV blocks in the host buffer, found by their content: those that leave the device go there, and come back by
loading.

A block leaves when vLLM hands its place to another request, or when its extent is unmapped. That includes the blocks of
a preempted request, but for its last one, if that is not full: see ``KvTails``.

One step:  watch (what may be evicted now) -> vLLM schedules: match, allocate -> settle (what was evicted)
"""

from collections.abc import Iterable, Sequence
from itertools import islice

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashWithGroupId, KVCacheBlock, get_block_hash

from memory_agent.kv_fingerprint import block_key
from replicas.break_even import Move
from replicas.host_traffic import HostTraffic
from replicas.vllm_adapter import free_blocks


class HostTier:
    """Lives in the scheduler's process; not thread-safe.

    Args:
        traffic: carries the copies.
        pool: vLLM's blocks, of one KV cache group. block_tokens: tokens of a block.
        fingerprint: says, with a block's hash, what its bytes are; 32 bytes.
    """

    def __init__(self, traffic: HostTraffic, pool: BlockPool, block_tokens: int, fingerprint: bytes) -> None:
        self._traffic = traffic
        self._pool = pool
        self._block_tokens = block_tokens
        self._fingerprint = fingerprint
        self._watched: list[tuple[KVCacheBlock, BlockHashWithGroupId]] = []
        self._evicted: dict[bytes, int] = {}
        self._matches: dict[str, tuple[int, list[bytes]]] = {}

    def evict(self, block: KVCacheBlock) -> None:
        """This block is about to lose its content, which lasts until the workers' part of the coming step."""
        if block.block_hash is not None:
            self._evicted[self._key(get_block_hash(block.block_hash))] = block.block_id

    def watch(self, blocks: int) -> None:
        """vLLM is about to allocate up to ``blocks`` blocks: remember what they hold now."""
        self.watch_blocks(islice(free_blocks(self._pool), blocks))

    def watch_blocks(self, blocks: Iterable[KVCacheBlock]) -> None:
        """vLLM may hand these blocks out in the coming step: remember what they hold now."""
        self._watched += [(block, block.block_hash) for block in blocks if block.block_hash is not None]

    def settle(self) -> None:
        """Have what was evicted so far stored. A block that has left the device can be found from here on."""
        for block, block_hash in self._watched:
            if block.block_hash != block_hash:
                self._evicted[self._key(get_block_hash(block_hash))] = block.block_id
        self._watched = [(block, block_hash) for block, block_hash in self._watched if block.block_hash == block_hash]
        evicted, self._evicted = self._evicted, {}
        self._traffic.store(evicted)

    def end_step(self) -> None:
        """vLLM has scheduled."""
        self.settle()
        self._watched = []

    def match(
        self,
        request_id: str,
        hashes: Sequence[BlockHash],
        computed_tokens: int,
        tokens: int,
        resumed: bool = False,
    ) -> int:
        """Tokens of the request, after the ``computed_tokens`` that the device has, that are to be loaded.

        Args:
            hashes: of the request's full blocks, from its first on.
            tokens: of the request now; at least the last one is computed.
            resumed: it was preempted. It does not wait until its blocks are stored: workers load after they store.
        """
        if resumed:
            self.settle()
        first, last = computed_tokens // self._block_tokens, (tokens - 1) // self._block_tokens
        keys = [self._key(block_hash) for block_hash in hashes[first:last]]
        asked_from, granted = self._matches.get(request_id, (first, None))
        found = self._traffic.buffer.match_prefix(keys, again=granted is not None, storing=resumed)
        if granted is None or asked_from != first:
            granted = []
        # vLLM asks again in each step until it has memory for the request: what was decided stays decided.
        more = self._traffic.pays(Move.LOAD, max(0, found - len(granted)))
        keys = keys[: min(found, len(granted) + more)]
        self._matches[request_id] = (first, keys)
        return len(keys) * self._block_tokens

    def allocate(self, request_id: str, block_ids: Sequence[int], loaded_tokens: int) -> None:
        """vLLM has given the request these blocks, and expects ``loaded_tokens`` tokens in them to be loaded."""
        first, keys = self._matches.pop(request_id, (0, []))
        self._traffic.load(keys[: loaded_tokens // self._block_tokens], block_ids[first:])

    def disbelieve(self, block_ids: Iterable[int]) -> None:
        """What these device blocks hold is wrong: nobody finds it, and it is not stored."""
        wrong = set(block_ids)
        self._watched = [(block, block_hash) for block, block_hash in self._watched if block.block_id not in wrong]
        self._pool.evict_blocks(wrong)

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._matches.pop(request_id, None)

    def clear(self) -> None:
        """Forget what was evicted or matched: the same tokens would have other KV from now on."""
        self._watched, self._evicted = [], {}
        self._matches.clear()

    def _key(self, block_hash: BlockHash) -> bytes:
        return block_key(self._fingerprint, block_hash)
