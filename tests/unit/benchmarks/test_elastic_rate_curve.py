"""Goodput over rate."""

import math

import pytest

from benchmarks.elastic.rate_curve import RatePoint, rate_at_target, ttft_at
from cluster.bench.report import RequestRecord, Slo


def point(rate: float, attainment: float, ttft_p99_s: float = 1.0) -> RatePoint:
    return RatePoint(rate, attainment, ttft_p99_s)


@pytest.mark.parametrize(
    ("points", "rate"),
    [
        ([point(1, 1.0), point(2, 0.8)], 1.5),
        ([point(2, 0.8), point(1, 1.0), point(3, 0.2)], 1.5),
        ([point(1, 1.0), point(2, 0.95)], 2.0),
        ([point(1, 0.5)], 0.0),
        ([point(1, 0.85), point(2, 0.9), point(3, 0.5)], 2.0),
    ],
)
def test_the_rate_that_attains_the_target(points: list[RatePoint], rate: float) -> None:
    """By a straight line between two rates, never beyond those measured; noise below the highest that attains it does
    not count."""
    assert rate_at_target(points) == pytest.approx(rate)


def test_ttft_between_two_rates() -> None:
    """By a straight line."""
    assert ttft_at([point(1, 1, 2.0), point(2, 1, 6.0)], 1.25) == pytest.approx(3.0)


def record(ttft_s: float, tpot_s: float, error: str | None = None) -> RequestRecord:
    return RequestRecord(
        index=0,
        due_s=0.0,
        sent_s=0.0,
        input_tokens=1,
        asked_tokens=11,
        clipped=False,
        output_tokens=11,
        ttft_s=ttft_s,
        latency_s=ttft_s + 10 * tpot_s,
        error=error,
    )


def test_ttft_counts_requests_that_kept_tpot() -> None:
    """A request that got its first token early and then stood still makes no latency better; one that failed is a
    miss."""
    records = [record(1.0, 0.1), record(4.0, 0.1), record(0.1, 2.0), record(math.nan, math.nan, "gone")]
    found = RatePoint.of(0.5, records, Slo(ttft_ms=3000, tpot_ms=1000))
    assert found.attainment == 0.25
    assert found.ttft_p99_s == pytest.approx(3.97)
