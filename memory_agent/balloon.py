"""The balloon: moves memory between the system and the KV cache, extent by extent.

    inflate    take chunks  ->  map all slots  ->  count            a failure undoes what was done: all or nothing
    deflate    uncount      ->  unmap slots    ->  give, trim       a failure leaves a remnant, and the rest goes on

Inflating and deflating are the directions of eLLM (arXiv 2506.15155). A deflate is never undone: its blocks are
already out of use, and what can go back should. A slot that could not be unmapped is a remnant: it belongs to no
extent, is still committed, and every later inflate or deflate makes use of it or tries again.
"""

import logging
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

from memory_agent.chunks import ChunkOwner, ChunkPool, PhysicalChunk
from memory_agent.errors import OutOfDeviceMemory, SettingsError
from memory_agent.extents import ExtentMap
from memory_agent.virtual_tensor import VirtualTensor
from memory_agent.vmm import ContractViolation

logger = logging.getLogger(__name__)


class Balloon:
    """The KV cache's memory. Used by one thread at a time; the only one to map slots of its tensor."""

    def __init__(self, pool: ChunkPool, tensor: VirtualTensor, extents: ExtentMap) -> None:
        if not pool.chunk_bytes == tensor.chunk_bytes == extents.chunk_bytes:
            raise SettingsError(
                f"chunk sizes differ: pool {pool.chunk_bytes}, tensor {tensor.chunk_bytes}, "
                f"extents {extents.chunk_bytes} bytes"
            )
        if tensor.size_bytes < extents.geometry.size_bytes:
            raise SettingsError(f"a KV cache of {extents.geometry.size_bytes} bytes in a tensor of {tensor.size_bytes}")
        self._pool = pool
        self._tensor = tensor
        self._extents = extents
        self._mapped: set[int] = set()
        self._users: dict[int, int] = {}  # slot -> mapped extents that need it; never 0
        self._remnants: set[int] = set()  # slots that are mapped although no extent needs them

    @property
    def mapped(self) -> AbstractSet[int]:
        """The extents whose blocks have memory; a live view."""
        return self._mapped

    @property
    def committed_bytes(self) -> int:
        """Bytes behind the tensor's slots, remnants included."""
        return self._tensor.mapped_bytes

    def inflate_kv(self, extent_ids: Iterable[int]) -> int:
        """Give memory to all these extents, or to none; return the bytes newly committed.

        Extents that have memory keep it. New memory reads zero unless the pool handed out a FREE chunk.

        Raises:
            PoolExhausted: the pool's limit leaves too few chunks. OutOfDeviceMemory: the system refused. After either
                ``mapped`` is as before, and so is every byte unless the undo itself was refused (a remnant, logged).
            IndexError: no such extent.
        """
        new = [extent for extent in dict.fromkeys(extent_ids) if extent not in self._mapped]
        wanted = dict.fromkeys(slot for extent in new for slot in self._extents.slots_of(extent))
        missing = [slot for slot in wanted if slot not in self._tensor.mapped_slots]
        chunks = self._pool.take(ChunkOwner.KV_CACHE, len(missing))
        self._map_all(missing, chunks)
        for extent in new:
            for slot in self._extents.slots_of(extent):
                self._users[slot] = self._users.get(slot, 0) + 1
        self._mapped.update(new)
        self._remnants.difference_update(wanted)
        return len(missing) * self._pool.chunk_bytes

    def deflate_kv(self, extent_ids: Iterable[int]) -> int:
        """Take the memory of these extents; when it returns, their bytes are back with the system. Return the bytes.

        Nothing may read or write the extents' blocks any more. Extents without memory are passed over. Slots that
        other mapped extents share stay.

        Raises OutOfDeviceMemory when the system refused some of it: the extents are out of ``mapped`` all the same,
        what could go back has gone, and the next call tries the rest again.
        """
        held_before = self._pool.held_bytes
        gone = [extent for extent in dict.fromkeys(extent_ids) if extent in self._mapped]
        for extent in gone:
            for slot in self._extents.slots_of(extent):
                self._users[slot] -= 1
                if not self._users[slot]:
                    del self._users[slot]
                    self._remnants.add(slot)
        self._mapped.difference_update(gone)
        self._drop_remnants()
        return held_before - self._pool.held_bytes

    def check_conservation(self) -> None:
        """Raise ContractViolation unless slots, extents and chunks agree, and the pool with the system."""
        users: dict[int, int] = {}
        for extent in self._mapped:
            for slot in self._extents.slots_of(extent):
                users[slot] = users.get(slot, 0) + 1
        if users != self._users:
            raise ContractViolation("the slots' counts of users are not those of the mapped extents")
        if self._remnants & users.keys() or self._tensor.mapped_slots != self._remnants | users.keys():
            raise ContractViolation(
                f"{len(self._tensor.mapped_slots)} slots are mapped, {len(users)} are used and "
                f"{len(self._remnants)} left over"
            )
        owned = self._pool.bytes_by_owner()[ChunkOwner.KV_CACHE]
        if owned != self.committed_bytes:
            raise ContractViolation(f"the KV cache owns {owned} bytes, {self.committed_bytes} are mapped")
        self._pool.check_conservation()

    def _map_all(self, slots: Sequence[int], chunks: Sequence[PhysicalChunk]) -> None:
        done = 0
        try:
            for slot, chunk in zip(slots, chunks, strict=True):
                self._tensor.map_slot(slot, chunk)
                done += 1
        except BaseException:  # undone whatever the reason, then raised again
            self._remnants.update(slots[:done])
            try:
                self._drop_remnants(unmapped=chunks[done:])
            except OutOfDeviceMemory as error:
                logger.warning("undoing an inflate left %d slots committed: %s", len(self._remnants), error)
            raise

    def _drop_remnants(self, unmapped: Sequence[PhysicalChunk] = ()) -> None:
        """Unmap every remnant, release its chunk and the ``unmapped`` ones. Raises the first refusal, at the end."""
        refusal: OutOfDeviceMemory | None = None
        chunks = list(unmapped)
        for slot in sorted(self._remnants):
            try:
                chunks.append(self._tensor.unmap_slot(slot))
            except OutOfDeviceMemory as error:
                refusal = refusal or error
            else:
                self._remnants.discard(slot)
        self._pool.give(ChunkOwner.KV_CACHE, chunks)
        try:
            self._pool.trim()
        except OutOfDeviceMemory as error:
            refusal = refusal or error
        if refusal is not None:
            raise refusal
