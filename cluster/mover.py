"""The requests of a core that move while their tokens stream: which can, and how those fared that did."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from http import HTTPStatus

from cluster.continuation import why_final
from cluster.crossing import Crossings
from cluster.errands import ERRAND_S, Errands
from cluster.migration import MigrationError, Rounds
from cluster.move import Migrated, MoveOutcome, Trigger
from cluster.relay import Relay


class Mover:
    """Of one core. Belongs to its event loop.

    Args:
        relays: by request id, as they come and go; replicas: ids of those that are there.
        block_tokens: tokens of a KV block.
        crossings: between nodes.

    Attributes:
        counts: migrations by trigger and outcome.
        downtimes: how many are known; downtime_s: their sum.
    """

    def __init__(
        self,
        model: str,
        relays: Mapping[str, Relay],
        errands: Errands,
        replicas: Callable[[], Collection[str]],
        block_tokens: int,
        crossings: Crossings,
    ) -> None:
        self._model, self._relays, self._errands = model, relays, errands
        self._replicas, self._block_tokens, self._crossings = replicas, block_tokens, crossings
        self.counts: Counter[tuple[Trigger, MoveOutcome]] = Counter()
        self.downtimes = 0
        self.downtime_s = 0.0

    async def move(self, request_id: str, to: str, trigger: Trigger = Trigger.REQUEST) -> Migrated:
        """Move a running request to the replica ``to``; returns when it has a token from there, or has ended. Raises
        MigrationError: it goes on where it is."""
        relay = self._movable(request_id, to)
        source = relay.replica
        assert source is not None
        run, tokens = self._errands.run_at, relay.token_ids
        rounds = Rounds(run, relay.request, tokens, source, to, self._block_tokens, self._crossings)
        relay.destination, relay.bring, relay.downtime_s = to, rounds.bring, math.nan
        relay.landed.clear()
        outcome = MoveOutcome.FAILED
        try:
            await rounds.push()
            await rounds.switch()
            await asyncio.wait_for(relay.landed.wait(), ERRAND_S)
            outcome = MoveOutcome.MOVED
        except TimeoutError:
            raise MigrationError(f"{to} has brought no token after {ERRAND_S:.0f} s; it may go on elsewhere") from None
        finally:
            relay.destination = relay.bring = None
            self.counts[trigger, outcome] += 1
            await rounds.end()
        downtime_s = None if math.isnan(relay.downtime_s) else relay.downtime_s
        if downtime_s is not None:
            self.downtimes += 1
            self.downtime_s += downtime_s
        return Migrated(request_id, source, to, rounds.ahead, rounds.done, downtime_s)

    @property
    def moved(self) -> int:
        """Requests that have moved."""
        return sum(count for (_, outcome), count in self.counts.items() if outcome is MoveOutcome.MOVED)

    def has(self, request_id: str) -> bool:
        """A request of this id runs here."""
        return bool(self._named(request_id))

    def _named(self, request_id: str) -> list[Relay]:
        """The relays of a request: vLLM makes one of each answer, and adds to its client's id."""
        return [
            relay
            for one, relay in self._relays.items()
            if not relay.finished
            and (one == request_id or one.startswith(f"{request_id}-") or relay.request.external_req_id == request_id)
        ]

    def _movable(self, request_id: str, to: str) -> Relay:
        """The relay of a request that can be moved to ``to``. Raises MigrationError."""
        mine = self._named(request_id)
        if not mine:
            raise MigrationError(
                f"no request {request_id} runs here: it has finished, or never was", HTTPStatus.NOT_FOUND
            )
        if len(mine) > 1:
            names = sorted(one.request_id for one in mine)
            raise MigrationError(f"{request_id} has {len(mine)} answers: name one of {names}")
        relay, there = mine[0], sorted(self._replicas())
        if to not in there:
            raise MigrationError(
                f"{self._model} has no replica {to}; it has {', '.join(there) or 'none now'}", HTTPStatus.NOT_FOUND
            )
        if relay.destination is not None:
            raise MigrationError(f"request {request_id} is being moved to {relay.destination} already")
        if relay.replica is None:
            raise MigrationError(f"request {request_id} waits for a replica: there is nothing to move")
        if relay.replica == to:
            raise MigrationError(f"request {request_id} is at {to} already")
        if (why := why_final(relay.request)) is not None:
            raise MigrationError(f"request {request_id} cannot be moved: {why}")
        return relay
