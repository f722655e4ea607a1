"""How much an API key may still ask for, in one ingress process. Pure: ``now_s`` is an argument.

    requests   a bucket of a minute's requests, one taken by each that begins
    tokens     a bucket of a minute's tokens, emptied by prompts and answers as they are computed, also below nothing

How long an answer gets is not known when its request comes. So a request begins while there is anything left, is never
cut, and what it took beyond that is missing to the next ones. What runs counts with what it has taken so far.
"""

import math
from collections.abc import Iterable
from typing import Protocol

_MINUTE_S = 60.0


class Consumer(Protocol):
    """A request: ``cluster.request_slo.RequestSlo`` is one."""

    @property
    def tokens(self) -> int:
        """Of its prompts and answers, so far."""


class Bucket:
    """Fills with ``per_min`` a minute, up to as many, and one at least."""

    def __init__(self, per_min: float, now_s: float) -> None:
        self.per_min = per_min
        self._most = max(1.0, per_min)
        self._left, self._at_s = self._most, now_s

    def left(self, now_s: float) -> float:
        self._left = min(self._most, self._left + max(0.0, now_s - self._at_s) * self.per_min / _MINUTE_S)
        self._at_s = max(self._at_s, now_s)
        return self._left

    def take(self, amount: float, now_s: float) -> None:
        self._left = self.left(now_s) - amount

    def wait_s(self, wanted: float, now_s: float) -> float:
        """Until so much is left, if nothing is taken meanwhile."""
        return max(0.0, wanted - self.left(now_s)) * _MINUTE_S / self.per_min


class KeyQuota:
    """Of one key. Used by one thread. None: no bound."""

    def __init__(self, requests_per_min: float | None, tokens_per_min: float | None, now_s: float) -> None:
        self._requests = Bucket(requests_per_min, now_s) if requests_per_min is not None else None
        self._tokens = Bucket(tokens_per_min, now_s) if tokens_per_min is not None else None
        self._running: set[Consumer] = set()

    def enter(self, now_s: float) -> tuple[str, int] | None:
        """Take one request; or why there is none left, and in how many whole seconds there is."""
        taken = _sum(self._running)
        if self._tokens is not None and self._tokens.left(now_s) - taken < 1:
            return "tokens", _whole(self._tokens.wait_s(1.0 + taken, now_s))
        if self._requests is not None:
            if self._requests.left(now_s) < 1:
                return "requests", _whole(self._requests.wait_s(1.0, now_s))
            self._requests.take(1, now_s)
        return None

    def begins(self, request: Consumer) -> None:
        """From here on its tokens count."""
        self._running.add(request)

    def ends(self, request: Consumer, now_s: float) -> None:
        """It takes nothing more."""
        self._running.discard(request)
        if self._tokens is not None:
            self._tokens.take(request.tokens, now_s)


def _sum(requests: Iterable[Consumer]) -> int:
    return sum(request.tokens for request in requests)


def _whole(seconds: float) -> int:
    return max(1, math.ceil(seconds))
