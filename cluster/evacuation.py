"""Empties replicas that are to have no requests: they move elsewhere with their KV, while their tokens stream.

    its replica drains, or Ray Serve ends it --> has a token? --> moved; fails again and again --> computed elsewhere
                                                 can it move? --> stays to its end, and is listed

Nothing that has been computed is thrown away but where nothing else helps, so a request that waits for its first token
is left to get it.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from cluster.continuation import why_final
from cluster.migration import CannotPush, MigrationError
from cluster.move import MoveOutcome, Trigger
from cluster.mover import Mover
from cluster.relay import Relay
from replicas.replica import ReplicaStats

logger = logging.getLogger("ray.serve")

TRIES = 3
"""Of a migration that fails, before the request is computed elsewhere."""


class Evacuation:
    """Of one core. Belongs to its event loop.

    Args:
        relays: as they come and go. recall: ends a request's present attempt, so that the next one goes elsewhere.

    Attributes:
        stays: why a request cannot be moved, by its id.
    """

    def __init__(self, mover: Mover, relays: Mapping[str, Relay], recall: Callable[[Relay, str], None]) -> None:
        self._mover, self._relays, self._recall = mover, relays, recall
        self.stays: dict[str, str] = {}
        self._failures: Counter[str] = Counter()
        self._emptying: dict[str, asyncio.Task[None]] = {}

    def look(self, leaving: Mapping[str, Trigger], takers: Sequence[ReplicaStats]) -> None:
        """Begin to empty what is not being emptied yet. To be called every now and then.

        Args:
            leaving: replicas to empty. takers: those that may get requests, as they were a moment ago.
        """
        self.stays = {one: why for one, why in self.stays.items() if one in self._relays}
        self._failures = Counter({one: count for one, count in self._failures.items() if one in self._relays})
        self._emptying = {one: task for one, task in self._emptying.items() if not task.done()}
        for replica, trigger in leaving.items():
            if replica not in self._emptying and (there := self._at(replica)):
                work = self._empty(replica, there, trigger, takers)
                self._emptying[replica] = asyncio.get_running_loop().create_task(work)

    def close(self) -> None:
        for task in self._emptying.values():
            task.cancel()

    def _at(self, replica: str) -> list[Relay]:
        relays = self._relays.values()
        return [one for one in relays if one.replica == replica and one.has_answered and not one.finished]

    async def _empty(
        self, source: str, relays: Sequence[Relay], trigger: Trigger, takers: Sequence[ReplicaStats]
    ) -> None:
        for relay in relays:
            gone = relay.finished or relay.replica != source
            if gone or relay.destination is not None or relay.request_id in self.stays:
                continue
            if (why := why_final(relay.request)) is not None:
                self.stays[relay.request_id] = why
                continue
            if (to := least_busy(takers, Counter(one.replica for one in self._relays.values()), source)) is None:
                return
            try:
                await self._mover.move(relay.request_id, to, trigger)
            except CannotPush as error:
                self.stays[relay.request_id] = str(error)
            except MigrationError as error:
                logger.warning("request %s has not left %s: %s", relay.request_id, source, error)
                self._failures[relay.request_id] += 1
                if self._failures[relay.request_id] == TRIES and not relay.finished and relay.replica == source:
                    self._mover.counts[trigger, MoveOutcome.RECOMPUTED] += 1
                    self._recall(relay, f"replica {source} is to be empty, and {error}")


def least_busy(takers: Iterable[ReplicaStats], here: Mapping[str | None, int], source: str) -> str | None:
    """The replica with the fewest requests, by its own count or by ``here``, whichever is more; then with the most free
    KV memory. None where there is no other than ``source``."""
    others = [one for one in takers if one.engine_id != source]
    best = min(
        others,
        key=lambda one: (max(one.streams, here.get(one.engine_id, 0)), one.scheduler.kv_cache_usage, one.engine_id),
        default=None,
    )
    return best.engine_id if best is not None else None
