"""Goodput over offered rate. Pure: what became of each request in, figures out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.bench.report import RequestRecord, Slo

TARGET = 0.9
"""Share of requests that must keep the SLO."""


@dataclass(frozen=True)
class RatePoint:
    """One variant at one offered rate.

    Attributes:
        rate: requests a second.
        attainment: share of all requests that kept TTFT and TPOT.
        ttft_p99_s: of requests that kept TPOT; NaN where none did.
    """

    rate: float
    attainment: float
    ttft_p99_s: float

    @classmethod
    def of(cls, rate: float, records: Sequence[RequestRecord], slo: Slo) -> "RatePoint":
        tpot = Slo(tpot_ms=slo.tpot_ms)
        kept = [record.ttft_s for record in records if tpot.kept_by(record)]
        attained = sum(slo.kept_by(record) for record in records) / len(records)
        return cls(rate, attained, float(np.percentile(kept, 99)) if kept else math.nan)


def rate_at_target(points: Sequence[RatePoint]) -> float:
    """The highest rate at which TARGET is attained, between two measured ones by a straight line; 0 where it is missed
    at the lowest already. Where it is kept at the highest, that one: the true rate is no lower."""
    ordered = sorted(points, key=lambda point: point.rate)
    kept = [i for i, point in enumerate(ordered) if point.attainment >= TARGET]
    if not kept:
        return 0.0
    last = kept[-1]
    here = ordered[last]
    if last + 1 == len(ordered):
        return here.rate
    beyond = ordered[last + 1]
    return here.rate + (beyond.rate - here.rate) * (here.attainment - TARGET) / (here.attainment - beyond.attainment)


def ttft_at(points: Sequence[RatePoint], rate: float) -> float:
    """TTFT p99 at ``rate``, between measured rates by a straight line."""
    ordered = sorted(points, key=lambda point: point.rate)
    return float(np.interp(rate, [point.rate for point in ordered], [point.ttft_p99_s for point in ordered]))
