"""How many requests may be in the engines so that each keeps its TPOT, found by trying. Pure: ``now_s`` is an argument.

    limit
      |        ___/|        ___/    a tenth more, while it is used and the TPOT is kept
      |    ___/    |    ___/
      |___/        |___/            less, as much as the TPOT is too long, once the last cut has taken effect
      +---------------------------> time

The TPOT of all is what they take together: seconds that requests decoded, over tokens that came. An engine that is
told to run fewer (``cluster.batch_sizing``) keeps the TPOT itself, and this limit then rises above what is used.
"""

import math

_WINDOW_S = 1.0
_DEEPEST_CUT = 0.7
_WANTED_S = 60.0
"""A target counts so long after the last request that had it."""
_GIVEN_UP_S = 30.0
"""A target that one request a replica does not keep either is left alone for so long: it only costs the others."""


class PaceLimit:
    """Used by one thread.

    Attributes:
        limit: requests; infinite while every TPOT is kept.
        floor: the limit is never below.
    """

    def __init__(self, floor: int) -> None:
        self.limit = math.inf
        self.floor = floor
        self._wanted: dict[float, float] = {}
        self._given_up_s = -math.inf
        self._seconds, self._tokens = 0.0, 0
        self._judged_s = -math.inf

    def want(self, tpot_s: float, now_s: float) -> None:
        """A request with this target has come."""
        self._wanted[tpot_s] = now_s

    def add(self, seconds: float, tokens: int) -> None:
        """A request has got so many tokens, after the first, in that time."""
        self._seconds += seconds
        self._tokens += tokens

    def is_due(self, now_s: float) -> bool:
        """Whether it is time for ``judge``."""
        return now_s - self._judged_s >= _WINDOW_S

    def judge(self, inside: int, now_s: float) -> None:
        """Raise or lower the limit by what was added since the last time; ``inside``: requests in the engines."""
        if self._tokens:
            self._move(self._seconds / self._tokens, inside, now_s)
        self._judged_s, self._seconds, self._tokens = now_s, 0.0, 0

    def _move(self, tpot_s: float, inside: int, now_s: float) -> None:
        target_s = min((one for one, at_s in self._wanted.items() if now_s - at_s <= _WANTED_S), default=math.inf)
        if tpot_s <= target_s:
            if inside >= 0.9 * self.limit:
                self.limit += max(1.0, 0.1 * self.limit)
        elif inside <= self.limit and now_s - self._given_up_s > _GIVEN_UP_S:
            if inside <= self.floor:
                self.limit, self._given_up_s = math.inf, now_s
            else:
                self.limit = max(self.floor, int(inside * max(_DEEPEST_CUT, target_s / tpot_s)))
