"""Which replica each session was sent to last, as far as one router knows."""

from collections import OrderedDict

Session = tuple[str, str]
"""Tenant and id: tenants that choose the same id have two sessions."""
_MOST = 100_000


class Sessions:
    """The most recently used ones. Used by one thread."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._replicas: OrderedDict[Session, str] = OrderedDict()

    def replica(self, session: Session) -> str | None:
        """Id of the replica that had it last; None for one that is new, or was forgotten."""
        return self._replicas.get(session)

    def sent(self, session: Session, replica_id: str) -> None:
        """A request of it goes to that replica."""
        self._replicas[session] = replica_id
        self._replicas.move_to_end(session)
        if len(self._replicas) > self._most:
            self._replicas.popitem(last=False)
