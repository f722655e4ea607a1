"""One request on its way: enough to send it again."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from vllm.v1.engine import EngineCoreRequest

from cluster.bench.report import Slo
from cluster.continuation import why_final
from cluster.request_slo import Part
from cluster.route import Route
from replicas.answer_journal import Mark
from replicas.hop import TPOT_TARGET_ARG, TTFT_TARGET_ARG
from replicas.migration_words import Moved, without_words

RETRIES = 2
"""Of a request that gets no token meanwhile."""
ATTEMPTS_MOST = 8
"""Of any request: one that kills its replica after a token each time must not go on for ever."""


@dataclass(eq=False)
class Relay:
    """Belongs to the event loop of its core.

    Attributes:
        request: as its client asked it.
        part: of the HTTP request whose context it came in: its targets are ``part.request.slo``.
        mark: by which its answer is found again, where its client has given it a key.
        token_ids: output ids received so far; prompt and these are what another replica would need to go on.
        fault: what is wrong with its outputs, or with its replica, where something is.
        deaths: of replicas that had it, one after the other, and gave no token of it; is_cause: they died of it, as far
            as it looks (``cluster.suspects``).
        base: tokens that there were when the present attempt began.
        route, ticket: of the present attempt.
        given_up: the present attempt is being cancelled for its fault, and not by the client; recalled: likewise, and
            it was nobody's fault.
        seen: tokens at the last look of ``cluster.attempt_watch``.
        wanted: the replica that its next attempt should go to.
        destination: the replica that it is being moved to.
        moved: its replica has let it go, and no attempt has followed yet. bring: has its KV where that will look.
        landed: after it has moved it has brought a token, or has ended.
        token_s: when its last token came, on the monotonic clock; downtime_s: from the last token before it moved to
            the first one after.
    """

    request: EngineCoreRequest
    part: Part
    mark: Mark | None = None
    task: "asyncio.Task[None] | None" = None
    token_ids: list[int] = field(default_factory=list)
    finished: bool = False
    fault: str | None = None
    retries_left: int = RETRIES
    attempts: int = 0
    deaths: int = 0
    is_cause: bool = False
    base: int = 0
    route: Route | None = None
    ticket: int = 0
    given_up: bool = False
    recalled: bool = False
    seen: int = 0
    wanted: str | None = None
    destination: str | None = None
    moved: Moved | None = None
    bring: Callable[[Moved], Awaitable[Moved]] | None = None
    landed: asyncio.Event = field(default_factory=asyncio.Event)
    token_s: float = math.nan
    downtime_s: float = math.nan

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def replica(self) -> str | None:
        """Where the present attempt runs, or is meant to run; None between two attempts."""
        return self.last_replica if self.route is not None and not self.route.over else None

    @property
    def last_replica(self) -> str | None:
        """Likewise of the latest attempt, also when that is over."""
        standing = self.route.replica if self.route is not None else None
        return standing.replica_id if standing is not None else None

    @property
    def mark_so_far(self) -> Mark | None:
        """The mark of an attempt that begins now."""
        return replace(self.mark, token_ids=list(self.token_ids)) if self.mark is not None else None

    @property
    def has_answered(self) -> bool:
        """The present attempt has brought a token."""
        return len(self.token_ids) > self.base

    @property
    def was_taken(self) -> bool:
        """A replica has taken the present attempt."""
        return self.route is not None and not math.isnan(self.route.accepted_s)

    @property
    def is_last_attempt(self) -> bool:
        """No other may follow the present one, unless it brings a token."""
        return not self.retries_left or self.attempts == ATTEMPTS_MOST

    async def await_kv(self) -> None:
        """After it has moved, before its next attempt: its KV is where that will look."""
        if self.moved is not None and self.bring is not None:
            self.moved = await self.bring(self.moved)

    def why_over(self) -> str | None:
        """Why the attempt that has failed was the last; None where another one may help."""
        if self.has_answered:
            self.retries_left = RETRIES
        if self.is_cause:
            return f"{self.deaths} replicas have died while they had it"
        if self.is_last_attempt:
            return f"{self.attempts} attempts have failed"
        return why_final(self.request) if self.token_ids else None

    def tell_engine(self, slo: Slo) -> None:
        """Put the targets where the engine looks for them."""
        if (params := self.request.sampling_params) is None:
            return
        params.extra_args = without_words(params.extra_args)
        targets = {TTFT_TARGET_ARG: slo.ttft_ms, TPOT_TARGET_ARG: slo.tpot_ms}
        known = {name: target for name, target in targets.items() if target is not None}
        if known:
            params.extra_args = {**(params.extra_args or {}), **known}
