"""What a request was promised, and what became of it: targets, and attainment and goodput by class, model and replica.

Pure. The live cluster, the simulator and the policies count with the same code. Every request that came counts: one
that was rejected, failed or ran out of time is a miss, one that its client gave up is nobody's fault and counts as
neither.

    attainment = requests that kept every target / requests that count
    goodput    = requests that kept every target / seconds; good tokens are the output tokens of these
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from cluster.bench.report import Slo
from cluster.config import SloClass

TTFT_HEADER, TPOT_HEADER, CLASS_HEADER = "x-slo-ttft-ms", "x-slo-tpot-ms", "x-slo-class"
"""The first two as llm-d names them."""
_LONGEST_TARGET_MS = 86_400_000.0


class SloHeaderError(ValueError):
    """A header that names no target; the message says what would."""


class Ending(StrEnum):
    """How a request ended."""

    ANSWERED = "answered"
    REJECTED = "rejected"
    """Refused before anything was computed."""
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    """Cancelled because its deadline had passed."""
    CANCELLED = "cancelled"
    """By its client."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request that has ended. Times in seconds; NaN where it never came so far.

    Attributes:
        replica: the one that answered or failed; empty where it was given to none.
        tpot_s: 0 where there is no second token.
    """

    slo_class: str
    model: str
    replica: str
    slo: Slo
    ending: Ending
    ttft_s: float = math.nan
    tpot_s: float = math.nan
    latency_s: float = math.nan
    output_tokens: int = 0

    @property
    def kept(self) -> bool:
        """Whether every target was met."""
        return self.ending is Ending.ANSWERED and self.slo.met_by(self.ttft_s, self.tpot_s, self.latency_s)


@dataclass
class Tally:
    """Counts of one class, model or replica."""

    endings: Counter[Ending] = field(default_factory=Counter)
    kept: int = 0
    good_tokens: int = 0

    @property
    def counted(self) -> int:
        """Requests that count."""
        return self.endings.total() - self.endings[Ending.CANCELLED]

    @property
    def attainment(self) -> float:
        """NaN where no request counts."""
        return self.kept / self.counted if self.counted else math.nan

    def add(self, outcome: Outcome) -> None:
        self.endings[outcome.ending] += 1
        if outcome.kept:
            self.kept += 1
            self.good_tokens += outcome.output_tokens

    def merge(self, other: "Tally") -> None:
        """Count what another one has counted."""
        self.endings.update(other.endings)
        self.kept += other.kept
        self.good_tokens += other.good_tokens

    def to_json(self, duration_s: float) -> dict[str, Any]:
        """JSON-ready; what there is none of is None."""
        counted = self.counted
        return {
            "requests": counted,
            **{str(ending): self.endings[ending] for ending in Ending},
            "kept": self.kept,
            "attainment": self.attainment if counted else None,
            "goodput_requests_per_s": self.kept / duration_s if duration_s > 0 else None,
            "goodput_tokens_per_s": self.good_tokens / duration_s if duration_s > 0 else None,
        }


class SloAccount:
    """Tallies of outcomes. Used by one thread."""

    def __init__(self) -> None:
        self.total = Tally()
        self.by_class: dict[str, Tally] = {}
        self.by_model: dict[str, Tally] = {}
        self.by_replica: dict[str, Tally] = {}

    def add(self, outcome: Outcome) -> None:
        """Count a request that has ended."""
        self.total.add(outcome)
        parts = (
            (self.by_class, outcome.slo_class),
            (self.by_model, outcome.model),
            (self.by_replica, outcome.replica or "none"),
        )
        for tallies, name in parts:
            if name not in tallies:
                tallies[name] = Tally()
            tallies[name].add(outcome)

    def merge(self, other: "SloAccount") -> None:
        """Count what another one has counted."""
        self.total.merge(other.total)
        parts = (
            (self.by_class, other.by_class),
            (self.by_model, other.by_model),
            (self.by_replica, other.by_replica),
        )
        for own, others in parts:
            for name, tally in others.items():
                own.setdefault(name, Tally()).merge(tally)

    def to_json(self, duration_s: float) -> dict[str, Any]:
        """JSON-ready, names in order. Replicas are left to who needs them: there can be thousands."""
        return {
            "total": self.total.to_json(duration_s),
            "classes": _named(self.by_class, duration_s),
            "models": _named(self.by_model, duration_s),
        }


def class_targets(slo_class: SloClass) -> Slo:
    """The targets of a class."""
    return Slo(ttft_ms=slo_class.ttft_ms, tpot_ms=slo_class.tpot_ms, e2el_ms=slo_class.deadline_ms)


def request_targets(classes: Sequence[SloClass], headers: Mapping[str, str]) -> tuple[SloClass, Slo]:
    """Class and targets of a request with these headers, their names in lower case. The first class where none is
    named.

    Raises SloHeaderError for a class that does not exist, and for a target that is no time.
    """
    name = headers.get(CLASS_HEADER)
    chosen = classes[0] if name is None else next((one for one in classes if one.name == name), None)
    if chosen is None:
        raise SloHeaderError(f"{CLASS_HEADER}: there is no class {name!r}, there is {_names(classes)}")
    own = class_targets(chosen)
    return chosen, Slo(
        ttft_ms=_target(headers, TTFT_HEADER, own.ttft_ms),
        tpot_ms=_target(headers, TPOT_HEADER, own.tpot_ms),
        e2el_ms=own.e2el_ms,
    )


def _target(headers: Mapping[str, str], name: str, default: float | None) -> float | None:
    text = headers.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= _LONGEST_TARGET_MS:
        raise SloHeaderError(
            f"{name}: {text[:40]!r} is no target; give milliseconds above 0, at most a day, such as 500"
        )
    return value


def _named(tallies: Mapping[str, Tally], duration_s: float) -> dict[str, Any]:
    return {name: tallies[name].to_json(duration_s) for name in sorted(tallies)}


def _names(classes: Iterable[SloClass]) -> str:
    return ", ".join(one.name for one in classes)
