"""Staged KV blocks as they go from one node to another: read from a segment, and written into its mirror there."""

import threading
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memory_agent.block_checksum import block_checksum
from memory_agent.host_segment import HostSegment, SegmentError, StoredBlock
from memory_agent.staging import segment_path

Bytes = NDArray[np.uint8]


class SentBlock(NamedTuple):
    """A block on its way. ``checksum``: of its bytes in one row, for the way alone."""

    slot: int
    stored: StoredBlock
    checksum: int


@dataclass(frozen=True)
class Staged:
    """Blocks of one rank's segment.

    Attributes:
        ranks: how many ranks have a segment.
        slot_bytes, slots, fingerprint: of the segment.
        payload: the bytes of ``blocks``, one after the other.
    """

    ranks: int = 0
    slot_bytes: int = 0
    slots: int = 0
    fingerprint: bytes = b""
    blocks: list[SentBlock] = field(default_factory=list)
    payload: Bytes = field(default_factory=lambda: np.empty(0, np.uint8))


def read_staged(origin: Path, rank: int, known: Collection[bytes], most_bytes: int) -> Staged:
    """Whole blocks of the segment whose keys are not ``known``, as many as ``most_bytes`` hold, at least one. Empty
    where there is no segment."""
    ranks = 0
    while segment_path(origin, ranks).exists():
        ranks += 1
    try:
        segment = HostSegment.open(segment_path(origin, rank))
    except SegmentError:
        return Staged(ranks)
    with closing(segment):
        wanted = [slot for key, slot in segment.scan().items() if key not in known]
        wanted = wanted[: max(1, most_bytes // segment.slot_bytes)]
        room, end, blocks = np.empty(len(wanted) * segment.slot_bytes, np.uint8), 0, []
        for slot in wanted:
            stored = segment.read_copy(slot, room[end:])
            if stored is not None and stored.key not in known:
                data = room[end : end + stored.length]
                blocks.append(SentBlock(slot, stored, _checksum(stored.key, data)))
                end += stored.length
        return Staged(ranks, segment.slot_bytes, segment.slots, segment.fingerprint, blocks, room[:end])


class Mirror:
    """What has come of one migration, a segment a rank. Calls may come from several threads.

    Attributes:
        used_s: when it was, on the clock of whoever keeps it.
    """

    def __init__(self, origin: Path) -> None:
        self.origin = origin
        self.used_s = 0.0
        self._segments: dict[int, HostSegment] = {}
        self._lock = threading.Lock()
        self._closed = False

    def keys(self, rank: int) -> set[bytes]:
        """Of the blocks that are there."""
        with self._lock:
            return set(self._segments[rank].scan()) if rank in self._segments else set()

    def put(self, rank: int, staged: Staged) -> set[bytes]:
        """Take in what has come. Returns the keys of blocks that have not come whole, and are not there.

        Raises MemoryError_ where there is no memory for them, and SegmentError where the mirror is closed."""
        damaged, at = set(), 0
        with self._lock:
            segment = self._segment(rank, staged) if staged.blocks else None
            for block in staged.blocks:
                assert segment is not None
                data = staged.payload[at : at + block.stored.length]
                at += block.stored.length
                if len(data) == block.stored.length and _checksum(block.stored.key, data) == block.checksum:
                    segment.write_copy(block.slot, block.stored, data)
                else:
                    damaged.add(block.stored.key)
        return damaged

    def close(self) -> None:
        """Nobody finds it any more, and it takes no memory."""
        with self._lock:
            self._closed = True
            for segment in self._segments.values():
                _remove(segment)
            self._segments.clear()

    def _segment(self, rank: int, staged: Staged) -> HostSegment:
        """Made where there is none, and anew where it is of another shape: another engine has come into the row."""
        if self._closed:
            raise SegmentError(f"{self.origin} is closed")
        shape = staged.slot_bytes, staged.slots, staged.fingerprint
        there = self._segments.get(rank)
        if there is None or (there.slot_bytes, there.slots, there.fingerprint) != shape:
            if there is not None:
                _remove(there)
                del self._segments[rank]
            self._segments[rank] = HostSegment.create(segment_path(self.origin, rank), *shape)
        return self._segments[rank]


def _remove(segment: HostSegment) -> None:
    segment.path.unlink(missing_ok=True)
    segment.close()


def _checksum(key: bytes, data: Bytes) -> int:
    return block_checksum(key, [data.view(np.uint64)[np.newaxis]])
