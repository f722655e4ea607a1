"""Wakes an idle engine when its lease has changed or its rest has come.

An idle engine sleeps and runs no step, so it does not read the lease board by itself. The replica process looks at
the engine's row for it, a few loads every 50 ms, and sends a harmless call when there is something to do.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from memory_agent.lease_board import EngineWord, Row

WATCH_PERIOD_S = 0.05
BACKOFF_START_S = 0.1
BACKOFF_LIMIT_S = 1.0


@dataclass(frozen=True)
class RowSample:
    """What of a row decides about waking: words of one moment."""

    lease_revision: int
    applied_revision: int
    busy: bool
    committed_bytes: int
    rest_bytes: int

    @classmethod
    def read(cls, row: Row) -> "RowSample":
        return cls(
            lease_revision=row.lease.revision,
            applied_revision=row.get(EngineWord.APPLIED_REVISION),
            busy=row.get(EngineWord.BUSY) != 0,
            committed_bytes=row.get(EngineWord.COMMITTED_BYTES),
            rest_bytes=row.get(EngineWord.REST_BYTES),
        )


class WakePolicy:
    """Decides when an idle engine is woken. Pure but for its own memory; ``now_s`` is any monotonic clock, in
    seconds.

    A busy engine steps and reads its row anyway: it is never woken. A wake-up that changes nothing is repeated
    after twice the time, up to BACKOFF_LIMIT_S, so that an engine that cannot follow is not kept awake.
    """

    def __init__(self, idle_release_s: float = 3.0) -> None:
        self._idle_release_s = idle_release_s
        self._idle_since_s: float | None = None
        self._woken_at: RowSample | None = None
        self._next_s = 0.0
        self._backoff_s = BACKOFF_START_S

    def should_wake(self, sample: RowSample, now_s: float) -> bool:
        """True where the engine should be woken now; the caller then wakes it."""
        if sample.busy:
            self._idle_since_s = None
            return False
        if self._idle_since_s is None:
            self._idle_since_s = now_s
        rested = now_s - self._idle_since_s > self._idle_release_s and sample.committed_bytes > sample.rest_bytes
        if sample.lease_revision == sample.applied_revision and not rested:
            return False
        if sample != self._woken_at:
            self._backoff_s = BACKOFF_START_S
        elif now_s < self._next_s:
            return False
        self._woken_at = sample
        self._next_s = now_s + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, BACKOFF_LIMIT_S)
        return True


async def watch_lease(row: Row, wake: Callable[[], Awaitable[object]], policy: WakePolicy) -> None:
    """Look at ``row`` for ever and call ``wake`` when the policy says so. Ends by cancellation or by what ``wake``
    raises."""
    while True:
        if policy.should_wake(RowSample.read(row), time.monotonic()):
            await wake()
        await asyncio.sleep(WATCH_PERIOD_S)
