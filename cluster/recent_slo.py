"""How requests have fared lately: the counts of the last minute, from those since the start. Pure."""

from collections import deque
from collections.abc import Mapping
from typing import Any

from cluster.slo import Ending

WINDOW_S = 60.0
_COUNTS = ("requests", "kept", *map(str, Ending))
_Counts = dict[str, dict[str, int]]


class RecentSlo:
    """Remembers what ``cluster.slo_ledger.to_json`` has said. ``now_s``: monotonic seconds of one clock."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, _Counts]] = deque()

    def add(self, slo: Mapping[str, Any], now_s: float) -> dict[str, Any]:
        """Take in the counts of now. JSON-ready: ``window_s``, how far back this looks, the window at most; and for
        each class what has ended within it, ``attainment`` None where nothing that counts has."""
        counts = {name: {key: tally[key] for key in _COUNTS} for name, tally in slo["classes"].items()}
        if self._seen and _fell(self._seen[-1][1], counts):
            self._seen.clear()  # an ingress has started anew, or did not answer
        self._seen.append((now_s, counts))
        while len(self._seen) > 1 and self._seen[1][0] <= now_s - self._window_s:
            self._seen.popleft()
        began_s, before = self._seen[0]
        return {
            "window_s": round(now_s - began_s, 3),
            "classes": {name: _since(before.get(name, {}), now) for name, now in counts.items()},
        }


def _since(before: Mapping[str, int], now: Mapping[str, int]) -> dict[str, Any]:
    new: dict[str, Any] = {key: now[key] - before.get(key, 0) for key in _COUNTS}
    new["attainment"] = new["kept"] / new["requests"] if new["requests"] else None
    return new


def _fell(before: _Counts, now: _Counts) -> bool:
    return any(now.get(name, {}).get(key, 0) < count for name, old in before.items() for key, count in old.items())
