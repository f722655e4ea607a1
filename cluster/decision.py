"""What the controller decided lately, with what it saw and why: what ``ellm explain`` shows. Pure."""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_KEPT = 1000


@dataclass(frozen=True)
class Decision:
    """One decision. Plain data: it crosses processes.

    Attributes:
        kind: "target", "scale", ...; subject: the replica or model that it is about.
        action: what is to be; reason: why, in words; inputs: what was seen, by name, of values that JSON has.
    """

    kind: str
    subject: str
    action: str
    reason: str
    inputs: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """For a log."""
        return f"{self.kind} {self.subject}: {self.action}, because {self.reason} {dict(self.inputs)}"


class DecisionLog:
    """The last decisions. ``now_s`` is monotonic seconds of one clock."""

    def __init__(self, kept: int = _KEPT) -> None:
        self._last: deque[tuple[float, Decision]] = deque(maxlen=kept)
        self.counts: Counter[str] = Counter()
        """Of all since the start, by kind."""

    def add(self, decision: Decision, now_s: float) -> None:
        """Keep it, and forget the oldest where there are too many."""
        self._last.append((now_s, decision))
        self.counts[decision.kind] += 1

    def last(self, count: int, subject: str, now_s: float) -> list[dict[str, Any]]:
        """JSON-ready, the newest first: at most ``count``, of subjects that contain ``subject``."""
        found = ((at_s, one) for at_s, one in reversed(self._last) if subject in one.subject)
        return [
            {
                "age_s": round(now_s - at_s, 3),
                "kind": one.kind,
                "subject": one.subject,
                "action": one.action,
                "reason": one.reason,
                "inputs": dict(one.inputs),
            }
            for (at_s, one), _ in zip(found, range(count), strict=False)
        ]
