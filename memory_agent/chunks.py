"""The chunk pool: every physical chunk of a device has exactly one owner.

        create                  take                  give                  release
system ---------> FREE ----------------> KV_CACHE, ... ------> FREE ----------------> system
                  |<---------------- held ------------------->|
                         |<--- in use, at most the limit --->|
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from memory_agent.errors import OutOfDeviceMemory, PoolExhausted, SettingsError
from memory_agent.vmm import ChunkHandle, ContractViolation, Vmm

logger = logging.getLogger(__name__)


class ChunkOwner(StrEnum):
    """Who uses a chunk."""

    FREE = "free"
    """Held by the pool, used by nobody."""
    KV_CACHE = "kv_cache"
    ACTIVATION = "activation"


@dataclass(frozen=True, eq=False)
class PhysicalChunk:
    """One chunk of a pool. Compared by identity: a new chunk is never taken for an old one with the same handle."""

    handle: ChunkHandle


class ChunkPool:
    """Hands out chunks of one size, under a limit. Used by one thread at a time; the only user of its Vmm's chunks.

    Args:
        chunk_bytes: a positive multiple of the Vmm's granularity, else SettingsError.
        limit_chunks: see ``limit_chunks``.
    """

    def __init__(self, vmm: Vmm, chunk_bytes: int, limit_chunks: int) -> None:
        if chunk_bytes <= 0 or chunk_bytes % vmm.granularity_bytes:
            near = max(1, round(chunk_bytes / vmm.granularity_bytes)) * vmm.granularity_bytes
            raise SettingsError(
                f"chunks of {chunk_bytes} bytes do not fit a granularity of {vmm.granularity_bytes} bytes; {near} would"
            )
        self.chunk_bytes = chunk_bytes
        self._vmm = vmm
        self._owners: dict[PhysicalChunk, ChunkOwner] = {}
        self._free: dict[PhysicalChunk, None] = {}  # ordered: the last one freed is the next one taken
        self.limit_chunks = limit_chunks

    @property
    def limit_chunks(self) -> int:
        """Most chunks in use or created. It may be set below what is held: nothing is taken away, nothing more is
        handed out until enough was given back, and FREE chunks above it go with the next ``give`` or ``trim``."""
        return self._limit_chunks

    @limit_chunks.setter
    def limit_chunks(self, value: int) -> None:
        if value < 0:
            raise SettingsError(f"a limit of {value} chunks is not possible; 0 is the least")
        self._limit_chunks = value

    @property
    def in_use_chunks(self) -> int:
        """Chunks that are not FREE."""
        return len(self._owners) - len(self._free)

    @property
    def available_chunks(self) -> int:
        """Chunks that ``take`` could hand out now, if the system has the memory."""
        return max(0, self._limit_chunks - self.in_use_chunks)

    @property
    def held_bytes(self) -> int:
        """Bytes of all chunks, FREE ones included, by the pool's own count."""
        return len(self._owners) * self.chunk_bytes

    def bytes_by_owner(self) -> dict[ChunkOwner, int]:
        """Held bytes of each owner, every owner named."""
        out = dict.fromkeys(ChunkOwner, 0)
        for owner in self._owners.values():
            out[owner] += self.chunk_bytes
        return out

    def take(self, owner: ChunkOwner, count: int) -> list[PhysicalChunk]:
        """Give ``count`` chunks to ``owner``: FREE ones first, then new ones. All or nothing.

        The data of a chunk that was FREE is what its last owner left.

        Raises:
            PoolExhausted: the limit leaves fewer.
            OutOfDeviceMemory: the system had no memory for a new chunk; those created before it are released again
                (one whose release fails too stays FREE).
        """
        if owner is ChunkOwner.FREE or count < 0:
            raise ContractViolation(f"{count} chunks cannot be taken for {owner}")
        if count > self.available_chunks:
            raise PoolExhausted(count, self.available_chunks)
        free_before = len(self._free)
        try:
            for _ in range(count - free_before):
                chunk = PhysicalChunk(self._vmm.create(self.chunk_bytes))
                self._owners[chunk] = ChunkOwner.FREE
                self._free[chunk] = None
        except BaseException:  # undone whatever the reason, then raised again
            self._trim_quietly(free_before)
            raise
        chunks = [self._free.popitem()[0] for _ in range(count)]
        self._owners.update(dict.fromkeys(chunks, owner))
        return chunks

    def give(self, owner: ChunkOwner, chunks: Iterable[PhysicalChunk]) -> None:
        """Make ``owner``'s chunks FREE. FREE chunks above the limit are released at once; one whose release the system
        refuses stays FREE (logged) until a later ``trim``."""
        given = list(chunks)
        strangers = [chunk for chunk in given if owner is ChunkOwner.FREE or self._owners.get(chunk) is not owner]
        if strangers or len(set(given)) < len(given):
            raise ContractViolation(f"{owner} gives chunks that are not its own, or one twice: {strangers or given}")
        self._owners.update(dict.fromkeys(given, ChunkOwner.FREE))
        self._free.update(dict.fromkeys(given))
        if len(self._owners) > self._limit_chunks:
            self._trim_quietly(self.available_chunks)

    def trim(self, keep_free: int = 0) -> int:
        """Release FREE chunks until ``keep_free`` are left; return the bytes that went back to the system.

        Raises OutOfDeviceMemory when the system refused some: these stay FREE, all others are gone.
        """
        refusal: OutOfDeviceMemory | None = None
        released = 0
        for chunk in list(self._free)[keep_free:]:
            try:
                self._vmm.release(chunk.handle)
            except OutOfDeviceMemory as error:
                refusal = refusal or error
                continue
            del self._free[chunk], self._owners[chunk]
            released += self.chunk_bytes
        if refusal is not None:
            raise refusal
        return released

    def check_conservation(self) -> None:
        """Raise ContractViolation unless every chunk has one owner and the system holds exactly the pool's bytes."""
        free = [chunk for chunk, owner in self._owners.items() if owner is ChunkOwner.FREE]
        if self._free.keys() != set(free):
            raise ContractViolation(f"{len(free)} chunks are owned by {ChunkOwner.FREE}, {len(self._free)} are listed")
        if len({chunk.handle for chunk in self._owners}) != len(self._owners):
            raise ContractViolation("two chunks of the pool are the same memory")
        if self._vmm.held_bytes() != self.held_bytes:
            raise ContractViolation(f"the pool counts {self.held_bytes} bytes, the system {self._vmm.held_bytes()}")

    def _trim_quietly(self, keep_free: int) -> None:
        """Trim where a refusal is no news to the caller: what it asked for is done, or has failed already."""
        try:
            self.trim(keep_free)
        except OutOfDeviceMemory as error:
            logger.warning("%d chunks stay free, %d wanted: %s", len(self._free), keep_free, error)
