"""The time per output token that one answer in ten exceeds, lately. Pure: ``now_s`` is of one monotonic clock."""

from collections import deque
from collections.abc import Iterable

_LATELY_S = 5.0
_MOST = 64
_TAIL = 0.9


class TpotTail:
    """Answers that have ended lately, each with its time per output token after the first."""

    def __init__(self) -> None:
        self._ended: deque[tuple[float, float]] = deque(maxlen=_MOST)

    def ended(self, tpot_s: float, now_s: float) -> None:
        """An answer is complete."""
        self._ended.append((now_s, tpot_s))

    def seconds(self, now_s: float, running: Iterable[float] = ()) -> float:
        """The TPOT that one in ten exceeds, of those that ended lately and those, so far, of answers that run; 0 where
        there are none."""
        while self._ended and now_s - self._ended[0][0] > _LATELY_S:
            self._ended.popleft()
        known = sorted([*running, *(tpot_s for _, tpot_s in self._ended)])
        return known[int(_TAIL * (len(known) - 1) + 0.5)] if known else 0.0
