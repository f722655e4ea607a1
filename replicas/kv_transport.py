"""How KV blocks of a running request get from one engine to another, ahead of the request and with it.

    source worker       send(place, key) ----> places of this rank ----> receive(origin, place, key)    worker there
    source scheduler    withdraw(places)       (staging memory)    <---- arrived(origin)             scheduler there

There are few places, so a destination that does not keep up holds the source back. A block is whole or not there:
readers check its key, its fingerprint and its checksum. Whoever sends may withdraw at any time.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

from memory_agent.errors import MemoryError_
from memory_agent.host_segment import HostSegment, Part, SegmentError
from memory_agent.kv_fingerprint import FINGERPRINT_BYTES
from memory_agent.staging import segment_path


class TransportError(Exception):
    """The block did not get there."""


class Transport(Protocol):
    """One rank's end of it. A block's parts are those of ``KvBlocks``, its key says all about its content."""

    @property
    def origin(self) -> str:
        """By which the other end finds what is sent from here."""
        ...

    def send(self, place: int, key: bytes, parts: Sequence[Part]) -> None:
        """Put a block where the other end can take it, in place of what is there. Raises TransportError."""
        ...

    def withdraw(self, places: Iterable[int]) -> None:
        """Nobody needs what is in these places."""
        ...

    def arrived(self, origin: str) -> Mapping[bytes, int]:
        """Place of every whole block that can be received from there, by its key; nothing where that end is gone, or
        its KV has another fingerprint."""
        ...

    def receive(self, origin: str, place: int, key: bytes, parts: Sequence[Part]) -> bool:
        """Copy the block into ``parts``; False where it is not there, whole. Their content is undefined then."""
        ...

    def close(self) -> None:
        """Give back what this end holds."""
        ...


class SharedMemoryTransport:
    """Between engines of one node: a host segment of ``places`` slots, made when it is needed first. A block is copied
    once to send it, and read from there straight into the KV memory of the destination. An engine on another node finds
    it in a mirror of the segment, beside its own board (``memory_agent.courier``).

    Args:
        base: path of the segment without its rank, beside the lease board.
        place_bytes: of a block on one rank.
        rank: of this worker; the scheduler takes 0.
        fingerprint: of this rank's KV.
    """

    def __init__(self, base: Path, place_bytes: int, places: int, rank: int, fingerprint: bytes) -> None:
        if len(fingerprint) != FINGERPRINT_BYTES:
            raise ValueError(f"a fingerprint of {len(fingerprint)} bytes")
        self._base = base
        self._place_bytes = place_bytes
        self._places = places
        self._rank = rank
        self._fingerprint = fingerprint
        self._segment: HostSegment | None = None

    @property
    def origin(self) -> str:
        return str(self._base)

    def send(self, place: int, key: bytes, parts: Sequence[Part]) -> None:
        try:
            if self._segment is None:
                path = self._path(self._base)
                path.unlink(missing_ok=True)  # of an engine before, in the same row
                self._segment = HostSegment.create(path, self._place_bytes, self._places, self._fingerprint)
            self._segment.write(place, key, parts)
        except (MemoryError_, OSError) as error:
            raise TransportError(str(error)) from error

    def withdraw(self, places: Iterable[int]) -> None:
        if self._segment is not None:
            self._segment.release(places)

    def arrived(self, origin: str) -> Mapping[bytes, int]:
        try:
            with closing(self._open(origin)) as segment:
                return segment.scan()
        except TransportError:
            return {}

    def receive(self, origin: str, place: int, key: bytes, parts: Sequence[Part]) -> bool:
        try:
            with closing(self._open(origin)) as segment:
                return segment.read_into(place, key, parts)
        except (TransportError, OSError):
            return False

    def close(self) -> None:
        if self._segment is not None:
            self._segment.path.unlink(missing_ok=True)
            self._segment.close()
            self._segment = None

    def _open(self, origin: str) -> HostSegment:
        """The segment there. Raises TransportError where there is none of the same KV, beside our own."""
        base = Path(origin)
        if base.parent != self._base.parent:
            raise TransportError(f"{origin} is not beside {self._base}")
        try:
            segment = HostSegment.open(self._path(base))
        except SegmentError as error:
            raise TransportError(str(error)) from error
        if segment.fingerprint != self._fingerprint:
            segment.close()
            raise TransportError(f"{origin} holds KV of another model")
        return segment

    def _path(self, base: Path) -> Path:
        return segment_path(base, self._rank)
