"""Which replica should get a request: the pure part of the request router."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memory_agent.reports import PressureLevel

PRESSURE_PENALTY = {PressureLevel.NORMAL: 0.0, PressureLevel.ELEVATED: 4.0, PressureLevel.CRITICAL: 0.0}
"""Requests in flight that a level weighs as much as. CRITICAL is a rank of its own, below all others."""
WAITING_WEIGHT = 2.0
"""A waiting request delays a new one more than a running one does: it is served before it."""


@dataclass(frozen=True)
class Candidate:
    """One replica as the router sees it.

    Attributes:
        in_flight: requests that this process has sent it and that have not ended.
        pressure: from the controller, NORMAL where it is not known; running, waiting: the engine's own counts, 0
            where not known.
    """

    replica_id: str
    in_flight: int
    pressure: PressureLevel = PressureLevel.NORMAL
    running: int = 0
    waiting: int = 0

    @property
    def load(self) -> float:
        """Requests ahead of a new one, in units of running requests.

        The engine's counts lag by up to a report's age but include what other ingress processes have sent; the
        local count knows what was sent a moment ago. The larger of both misses least.
        """
        reported = self.running + WAITING_WEIGHT * self.waiting
        return max(float(self.in_flight), reported) + PRESSURE_PENALTY[self.pressure]


def rank(candidates: Sequence[Candidate], tie_break: Callable[[], float]) -> list[str]:
    """Replica ids, best first.

    Replicas under CRITICAL pressure come after all others; then the least load decides, then the fewest requests in
    flight, then ``tie_break`` (a number for each, random in production).
    """

    def key(candidate: Candidate) -> tuple[bool, float, int, float]:
        critical = candidate.pressure == PressureLevel.CRITICAL
        return critical, candidate.load, candidate.in_flight, tie_break()

    return [candidate.replica_id for candidate in sorted(candidates, key=key)]
