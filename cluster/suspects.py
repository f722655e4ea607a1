"""Requests that replicas die of: each is noticed at its second or third death, and refused when it comes again.

    first death     it was there and had no token from the replica: suspected, and tried again
    second death    nobody else like it was there: it is the cause
                    others were: each of them is tried once more, one after the other
    third death     it is the cause

A token clears a request, also of whoever asks the same: so what merely stood beside, or is asked often, is not
suspected for long; and replicas that die of something else, one soon after the other, condemn nobody who waits.
"""

import asyncio
import hashlib
import time
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from vllm.v1.engine import EngineCoreRequest

DEATHS = 2
"""After so many without a token between them a request is the cause, or tried by itself."""
REFUSED_S = 600.0
_MOST = 1024

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class _Record:
    """Deaths of a prompt, which replica's and when the last one was, and whether it is the cause."""

    deaths: int
    replica: str
    last_s: float
    is_cause: bool


class Suspects:
    """Of one core. Requests are the same that have the same prompt; of those without token ids none is suspected."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deaths: dict[bytes, _Record] = {}
        """By digest of the prompt, the oldest first."""
        self._parties: dict[str, int] = {}
        """Requests without a token at replicas that have died, the oldest first."""
        self._turn = asyncio.Lock()
        self._tried: str | None = None
        """The request whose turn it is."""

    def __len__(self) -> int:
        return len(self._deaths)

    def died_with(self, request: EngineCoreRequest, deaths: int, replica: str, party: int) -> bool:
        """A replica has died that had it, and had given no token of it.

        Args:
            deaths: of replicas that had it, this one included. party: requests without a token that were there; what is
                said first of a replica counts.

        Returns whether it is taken to be the cause.
        """
        party = self._parties.setdefault(replica, party)
        _bound(self._parties)
        before = self._deaths.pop(_digest(request), None)
        if before is not None:
            deaths = max(deaths, before.deaths + (before.replica != replica))
        is_cause = deaths > DEATHS or (deaths == DEATHS and party <= 1)
        if request.prompt_token_ids:
            self._deaths[_digest(request)] = _Record(deaths, replica, self._clock(), is_cause)
            _bound(self._deaths)
        return is_cause

    @asynccontextmanager
    async def in_turn(self, request: EngineCoreRequest, deaths: int) -> AsyncIterator[None]:
        """For an attempt at it. One that is tried by itself waits until those before it have a token, or have died."""
        if deaths < DEATHS:
            yield
            return
        await self._turn.acquire()
        self._tried = request.request_id
        try:
            yield
        finally:
            self._end_turn(request)

    def answered(self, request: EngineCoreRequest) -> None:
        """It has a token."""
        self._end_turn(request)
        if self._deaths:
            self._deaths.pop(_digest(request), None)

    def why_refused(self, request: EngineCoreRequest) -> str | None:
        """Why it is not to reach another replica; None where it may."""
        if not self._deaths:
            return None
        known = self._deaths.get(_digest(request))
        if known is None or not known.is_cause or (left_s := known.last_s + REFUSED_S - self._clock()) <= 0:
            return None
        return (
            f"{known.deaths} replicas have died while they computed this prompt, so it is refused for {left_s:.0f} s "
            "more; their logs say what they died of"
        )

    def _end_turn(self, request: EngineCoreRequest) -> None:
        if self._tried == request.request_id:
            self._tried = None
            self._turn.release()


def _bound(known: dict[K, V]) -> None:
    """Forget the oldest of too many."""
    if len(known) > _MOST:
        del known[next(iter(known))]


def _digest(request: EngineCoreRequest) -> bytes:
    return hashlib.blake2b(array("q", request.prompt_token_ids or ()).tobytes(), digest_size=16).digest()
