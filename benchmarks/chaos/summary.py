"""What a run comes to: the headline, and whether it passed. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.chaos.comparison import Mismatch
from benchmarks.chaos.kills import Kill, Kind


@dataclass
class Found:
    """What a run has found.

    Attributes:
        answers: streams that have ended whole. lost: why each other one has not, in words.
        refused: attempts to begin a stream that got 429 or 503, after which the client tried again; cut: streams that
            an ingress kill has broken off, which were asked for again.
        migrations: by outcome. continued: requests that went on after the death of their replica.
        conservation_failures: of all engines; the most that any status has shown of each.
        unsettled: what has not come to rest after the last stream, in words; left: likewise what was not removed.
    """

    kills: list[Kill] = field(default_factory=list)
    skipped: list[Kind] = field(default_factory=list)
    answers: int = 0
    tokens: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[Mismatch] = field(default_factory=list)
    refused: int = 0
    cut: int = 0
    longest_pause_s: float = 0.0
    migrations: dict[str, int] = field(default_factory=dict)
    continued: int = 0
    retried: int = 0
    conservation_failures: int = 0
    unsettled: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Something is lost, wrong, not conserved or left behind, or has not come back."""
        back = all(kill.recovered_s is not None for kill in self.kills)
        return bool(self.lost or self.wrong or self.conservation_failures or self.unsettled or self.left) or not back


def headline(found: Found) -> dict[str, Any]:
    """The last line of a run."""
    killed = [kill for kill in found.kills if kill.kind is not Kind.DRAIN]
    return {
        "requests_lost": len(found.lost),
        "wrong_tokens": len(found.wrong),
        "kills_by_kind": dict(sorted(Counter(str(kill.kind) for kill in killed).items())),
        "inflight_at_kill": [kill.in_flight for kill in killed],
        "recovered": sum(kill.recovered_s is not None for kill in killed),
        "migrations_completed": found.migrations.get("moved", 0),
    }


def details(found: Found) -> dict[str, Any]:
    """Everything else."""
    return {**asdict(found), "recovered_s_by_kind": _recoveries(found.kills)}


def _recoveries(kills: Sequence[Kill]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {}
    for kill in kills:
        if kill.recovered_s is not None:
            times.setdefault(str(kill.kind), []).append(round(kill.recovered_s, 1))
    return times
