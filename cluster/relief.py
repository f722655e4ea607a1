"""Requests leave replicas that are full or late, as the controller orders (``cluster.move_planner``).

    order: from, to, how much --> one of this core's requests there --> has no token? a new attempt goes to the other
                                                                    --> runs? moves with its KV (``cluster.mover``)

Several ingress processes get the same orders. Each obeys its part of them, by chance, so that one request goes for an
order on average, and not one of each.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from cluster.continuation import why_final
from cluster.migration import CannotPush, MigrationError
from cluster.move import MoveOutcome
from cluster.move_planner import Candidate, MoveOrder, pick
from cluster.mover import Mover
from cluster.prompt_prefix import prompt_length
from cluster.relay import Relay

logger = logging.getLogger("ray.serve")

STAY_S = 10.0
"""A request that went elsewhere stays there so long at least."""
_WORTH_TOKENS = 16
"""A request that may have fewer tokens more is let to its end."""


class Relief:
    """Of one core. Belongs to its event loop.

    Args:
        relays: as they come and go. recall: ends a request's present attempt, so that the next one goes elsewhere.
        takes: whether a replica may get requests.
        share: of the orders that this process obeys.
    """

    def __init__(
        self,
        mover: Mover,
        relays: Mapping[str, Relay],
        recall: Callable[[Relay, str], None],
        takes: Callable[[str], bool],
        share: float,
    ) -> None:
        self._mover, self._relays, self._recall, self._takes = mover, relays, recall, takes
        self._share, self._rng = share, random.Random()
        self._number = 0
        self._went_s: dict[str, float] = {}
        self._moving: dict[str, asyncio.Task[None]] = {}
        self._fixed: set[str] = set()
        """Replicas whose engines cannot move any request."""

    def obey(self, orders: Iterable[MoveOrder]) -> None:
        """Begin what is new among the controller's orders, for whatever model."""
        self._went_s = {one: at_s for one, at_s in self._went_s.items() if one in self._relays}
        self._moving = {source: task for source, task in self._moving.items() if not task.done()}
        for order in orders:
            if order.number <= self._number:
                continue
            self._number = order.number
            if self._takes(order.destination) and self._rng.random() < self._share:
                self._begin(order)

    def close(self) -> None:
        for task in self._moving.values():
            task.cancel()

    def _begin(self, order: MoveOrder) -> None:
        chosen = pick(order, list(self._candidates(order.source)))
        if chosen is None:
            return
        relay = self._relays[chosen.request_id]
        self._went_s[relay.request_id] = time.monotonic()
        if chosen.answered:
            self._moving[order.source] = asyncio.get_running_loop().create_task(self._move(relay, order))
            return
        self._mover.counts[order.trigger, MoveOutcome.REROUTED] += 1
        relay.wanted, relay.attempts = order.destination, relay.attempts - 1
        self._recall(relay, f"replica {order.source} has no room for it now, and {order.destination} has")

    def _candidates(self, source: str) -> Iterator[Candidate]:
        """Requests of this core that may leave ``source``, in the order of their arrival."""
        now_s = time.monotonic()
        for relay in self._relays.values():
            rests = now_s - self._went_s.get(relay.request_id, -math.inf) < STAY_S
            if relay.replica != source or relay.finished or relay.destination is not None or rests:
                continue
            if relay.moved is not None or relay.recalled or relay.given_up:
                continue
            if relay.token_ids and (why_final(relay.request) is not None or _left(relay) < _WORTH_TOKENS):
                continue
            if relay.has_answered and (source in self._fixed or source in self._moving):
                continue
            tokens = prompt_length(relay.request) + len(relay.token_ids)
            yield Candidate(relay.request_id, tokens, relay.has_answered)

    async def _move(self, relay: Relay, order: MoveOrder) -> None:
        try:
            await self._mover.move(relay.request_id, order.destination, order.trigger)
        except CannotPush:
            self._fixed.add(order.source)
        except MigrationError as error:
            logger.info("request %s has not left %s: %s", relay.request_id, order.source, error)


def _left(relay: Relay) -> float:
    """Tokens that its answer may have beside those that have come."""
    params = relay.request.sampling_params
    most = params.max_tokens if params is not None else None
    return math.inf if most is None else most - len(relay.token_ids)
