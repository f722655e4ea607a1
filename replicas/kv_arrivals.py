"""The destination's side of a migration: KV from staging memory becomes an ordinary prefix-cache hit.

    ahead    a request of the tokens so far, for one token: vLLM takes what it has, loads the rest, and caches it under
             its own hashes, adapter and salt among them; its full blocks stay pinned when it has ended
    switch   the request itself finds these, loads the last blocks and the tail, and computes its newest token

A block is asked for by the key that this engine would give it, so KV of anything else is not found but computed.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from memory_agent.kv_fingerprint import block_key, tail_key
from replicas.load_doubts import LoadDoubts
from replicas.migration_words import Arrival, arrival

if TYPE_CHECKING:
    from vllm.v1.request import Request

WAIT_S = 1.0
"""For KV that was announced; after it what is missing is computed."""
PIN_S = 15.0
"""For the request that moves; after it its blocks are like any other's."""


class Load(NamedTuple):
    """A block to load from a place of the staging memory at ``origin``."""

    origin: str
    place: int
    block_id: int
    key: bytes


@dataclass
class _Asked:
    """A request that waits for its KV. ``keys``: of what it was told to load, from block ``first`` on."""

    since_s: float
    first: int = 0
    keys: list[tuple[bytes, int]] = field(default_factory=list)


@dataclass
class _Pin:
    blocks: list[KVCacheBlock]
    until_s: float


class KvArrivals:
    """Lives in the scheduler's process; not thread-safe.

    Args:
        fingerprint: of the KV, 32 bytes.
        arrived: see ``Transport``.
        disbelieve: see ``LoadDoubts``.
    """

    def __init__(
        self,
        pool: BlockPool,
        block_tokens: int,
        fingerprint: bytes,
        arrived: Callable[[str], Mapping[bytes, int]],
        disbelieve: Callable[[Sequence[int]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._block_tokens = block_tokens
        self._fingerprint = fingerprint
        self._arrived = arrived
        self._clock = clock
        self._asked: dict[str, _Asked] = {}
        self._pins: dict[str, _Pin] = {}
        self._loads: list[Load] = []
        self._loading: set[int] = set()
        self.doubts = LoadDoubts(lambda: {load.block_id for load in self._loads} | self._loading, disbelieve)
        self.loaded_blocks = 0
        """Blocks that came whole."""

    def match(self, request: "Request", computed_tokens: int) -> int | None:
        """Tokens of a waiting request, after the ``computed_tokens`` that the device has, that are to be loaded; None
        where it is worth asking again in the next step."""
        said = self._said(request)
        if said is None:
            return 0
        asked = self._asked.setdefault(request.request_id, _Asked(self._clock()))
        wanted = self._keys(request, said, computed_tokens)
        arrived = self._arrived(said.origin) if wanted else {}
        found = []
        for key in wanted:
            if key not in arrived:
                break
            found.append((key, arrived[key]))
        if len(found) < len(wanted) and self._clock() - asked.since_s < WAIT_S:
            return None
        asked.first, asked.keys = computed_tokens // self._block_tokens, found
        if not found:
            return 0
        return min(computed_tokens + len(found) * self._block_tokens, self._useful(request, said)) - computed_tokens

    def allocate(self, request: "Request", block_ids: Sequence[int], loaded_tokens: int) -> bool:
        """vLLM has given the request these blocks, and expects ``loaded_tokens`` tokens in them to be loaded. False
        where they are not to come from here."""
        asked, said = self._asked.pop(request.request_id, None), arrival(request.sampling_params)
        if asked is None or said is None:
            return False
        keys = asked.keys if loaded_tokens else []
        self._loads += [
            Load(said.origin, place, block_id, key)
            for (key, place), block_id in zip(keys, block_ids[asked.first :], strict=False)
        ]
        if not said.pin:
            self._unpin(said.move)
        return bool(keys)

    def finish(self, request: "Request", block_ids: Sequence[int]) -> None:
        """The request has ended, and is about to lose these blocks: those that came ahead of another one stay."""
        self._asked.pop(request.request_id, None)
        said = arrival(request.sampling_params)
        if said is not None and said.pin and request.num_output_tokens:
            blocks = [self._pool.blocks[one] for one in block_ids[: request.num_prompt_tokens // self._block_tokens]]
            self._pool.touch(blocks)
            self._unpin(said.move)
            self._pins[said.move] = _Pin(blocks, self._clock() + PIN_S)
        self.doubts.ended(request.request_id)
        self.doubts.lose(None, block_ids)

    def expire(self) -> None:
        """Free what was pinned for a request that has not come."""
        for move in [move for move, pin in self._pins.items() if pin.until_s < self._clock()]:
            self._unpin(move)

    def clear(self) -> None:
        """Forget every block: the same tokens would have other KV from now on."""
        for move in list(self._pins):
            self._unpin(move)

    def take(self) -> list[Load]:
        """The loads of this step."""
        loads, self._loads = self._loads, []
        self._loading |= {load.block_id for load in loads}
        return loads

    def landed(self, loads: Sequence[Load], damaged: set[bytes]) -> None:
        """Every rank has answered for these."""
        block_ids = {load.block_id for load in loads}
        self._loading -= block_ids
        self.loaded_blocks += sum(load.key not in damaged for load in loads)
        self.doubts.landed(block_ids)

    @property
    def pinned_blocks(self) -> int:
        return sum(len(pin.blocks) for pin in self._pins.values())

    def _said(self, request: "Request") -> Arrival | None:
        """Only at its first start: what it loses later comes back as any other's does."""
        if request.num_preemptions or request.skip_reading_prefix_cache:
            return None
        return arrival(request.sampling_params)

    def _useful(self, request: "Request", said: Arrival) -> int:
        """Tokens to have: at least the last one is computed."""
        return min(said.computed, request.num_tokens - 1)

    def _keys(self, request: "Request", said: Arrival, computed_tokens: int) -> list[bytes]:
        """Of the blocks behind ``computed_tokens``, the tail's last."""
        useful = self._useful(request, said)
        first, full = computed_tokens // self._block_tokens, useful // self._block_tokens
        keys = [block_key(self._fingerprint, block_hash) for block_hash in request.block_hashes[first:full]]
        if useful % self._block_tokens and useful > computed_tokens:
            keys.append(tail_key(self._fingerprint, request.request_id, useful))
        return keys

    def _unpin(self, move: str) -> None:
        pin = self._pins.pop(move, None)
        if pin is not None:
            self._pool.free_blocks(reversed(pin.blocks))
