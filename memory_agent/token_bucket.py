"""A bound on bytes a second."""

import time
from collections.abc import Callable

_BURST_S = 0.25


class TokenBucket:
    """Tokens come at ``bytes_s`` a second, at most a quarter of a second's worth. None: there is no bound."""

    def __init__(self, bytes_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._bytes_s = bytes_s
        self._clock = clock
        self._tokens = _BURST_S * (bytes_s or 0.0)
        self._at_s = clock()

    def take(self, count_bytes: int) -> float:
        """Bytes that have been moved, of which nobody knew before how many. Returns how many seconds to wait before
        the next are."""
        if self._bytes_s is None:
            return 0.0
        now_s = self._clock()
        came = (now_s - self._at_s) * self._bytes_s
        self._tokens = min(self._tokens + came, _BURST_S * self._bytes_s) - count_bytes
        self._at_s = now_s
        return max(0.0, -self._tokens / self._bytes_s)
