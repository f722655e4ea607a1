"""What scheduler and workers say to each other about the host buffer, carried beside ``KvMoves`` and ``KvAcks``."""

from dataclasses import dataclass, field
from typing import NamedTuple


class HostCopy(NamedTuple):
    """One KV block to copy between the device and a slot of every rank's host segment."""

    slot: int
    block_id: int
    key: bytes


@dataclass
class HostWork:
    """Copies of one step. ``release`` and ``store`` come before extents are unmapped and blocks are written anew,
    ``load`` comes when the step's extents are mapped, before the forward."""

    sequence: int = 0
    release: list[int] = field(default_factory=list)
    store: list[HostCopy] = field(default_factory=list)
    load: list[HostCopy] = field(default_factory=list)


@dataclass
class HostReport:
    """One worker's answer to one HostWork, and how long the forward of the step before it took.

    Attributes:
        sequence: of the HostWork.
        unstored, unloaded: keys that could not be written, or were not found whole.
        stored_bytes, store_s, loaded_bytes, load_s: what the copies moved, and their time.
        forward_tokens, forward_rows, forward_s: tokens and requests of the last forward that was timed; 0 for none.
    """

    sequence: int
    unstored: list[bytes] = field(default_factory=list)
    unloaded: list[bytes] = field(default_factory=list)
    stored_bytes: int = 0
    store_s: float = 0.0
    loaded_bytes: int = 0
    load_s: float = 0.0
    forward_tokens: int = 0
    forward_rows: int = 0
    forward_s: float = 0.0
