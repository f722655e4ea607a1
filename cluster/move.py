"""A migration of a running request: why it was begun, and how it went."""

from dataclasses import dataclass
from enum import StrEnum


class Trigger(StrEnum):
    """Why a request moves."""

    REQUEST = "request"
    """Somebody has asked for it."""
    DRAIN = "drain"
    """Its replica, or its node, drains."""
    STOP = "stop"
    """Ray Serve ends its replica: fewer are needed, a new version comes, or the node goes."""
    EXHAUSTION = "exhaustion"
    """Its replica is about to run out of KV memory."""
    FRAGMENTATION = "fragmentation"
    """A prompt waits at its replica, for memory that there is elsewhere."""
    SLO = "slo"
    """Its replica is late, and another one has room."""


class MoveOutcome(StrEnum):
    """What became of a migration."""

    MOVED = "moved"
    REROUTED = "rerouted"
    """It had no token yet, and waits elsewhere now."""
    FAILED = "failed"
    """It went on where it was, or was continued as after a replica's death."""
    RECOMPUTED = "recomputed"
    """It had to leave without its KV, and was continued as after a replica's death."""


@dataclass(frozen=True)
class Migrated:
    """How a migration went.

    Attributes:
        blocks_ahead: full KV blocks that were at the destination before the switch, in ``rounds``.
        downtime_s: from the last token at the source to the first one of the destination; None where the answer ended
            with the switch.
    """

    request_id: str
    source: str
    destination: str
    blocks_ahead: int
    rounds: int
    downtime_s: float | None
