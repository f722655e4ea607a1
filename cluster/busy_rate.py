"""How fast work is done while there is some to do. Pure: ``now_s`` is an argument.

    busy   |#####|        |##########|          rate = what was done / busy time, the older the less it counts
    done    1 2  3         4  5  6  7

Time without work says nothing of the rate, so it is known as well after a quiet hour as before.
"""

import math

_MEMORY_S = 10.0


class BusyRate:
    """Used by one thread; ``now_s`` never falls."""

    def __init__(self, credit: float = 0.0) -> None:
        """credit: counts as done at once in the beginning. With it the rate is no longer unknown after some busy time
        without anything done, but falls from very high."""
        self._done, self._busy_s = credit, 0.0
        self._since_s: float | None = None
        """Busy from then on, as far as it is not in ``_busy_s``; None while there is nothing to do."""

    def set_busy(self, busy: bool, now_s: float) -> None:
        """From now on there is something to do, or nothing."""
        self._age(now_s)
        self._since_s = now_s if busy else None

    def done(self, amount: float, now_s: float) -> None:
        """So much of it is done; nothing where there was nothing to do."""
        if self._since_s is not None:
            self._age(now_s)
            self._done += amount

    def seconds_for(self, amount: float, now_s: float, unknown: float) -> float:
        """How long that much takes; ``unknown`` before any was done."""
        rate = self.per_s(now_s, math.nan)
        return unknown if math.isnan(rate) else amount / rate

    def per_s(self, now_s: float, unknown: float) -> float:
        """Above 0; ``unknown`` before any was done. While nothing is done any more it falls."""
        if self._done <= 0:
            return unknown
        busy_s = self._busy_s + (now_s - self._since_s if self._since_s is not None else 0.0)
        return self._done / busy_s if busy_s > 0 else unknown

    def _age(self, now_s: float) -> None:
        if self._since_s is None:
            return
        passed_s, self._since_s = now_s - self._since_s, now_s
        kept = math.exp(-passed_s / _MEMORY_S)
        self._done *= kept
        self._busy_s = self._busy_s * kept + passed_s
