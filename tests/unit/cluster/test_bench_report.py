"""The figures of a report, from records whose answer is known by hand."""

import io
import json
import math
from array import array

import pytest
from rich.console import Console

from cluster.bench.errors import BenchError
from cluster.bench.render import render_report
from cluster.bench.report import LoadReport, RequestRecord, Slo, parse_percentiles


def answered(
    index: int, ttft_s: float, gaps_s: list[float], tokens: int | None = None, late_s: float = 0.0
) -> RequestRecord:
    return RequestRecord(
        index=index,
        due_s=float(index),
        sent_s=index + late_s,
        input_tokens=100,
        asked_tokens=len(gaps_s) + 1,
        clipped=False,
        output_tokens=len(gaps_s) + 1 if tokens is None else tokens,
        ttft_s=ttft_s,
        latency_s=ttft_s + sum(gaps_s),
        itls_s=array("d", gaps_s),
    )


def failed(index: int, reason: str = "status 500: no") -> RequestRecord:
    return RequestRecord(index, float(index), float(index), 100, 4, False, error=reason)


def report(*records: RequestRecord, slo: Slo | None = None, duration_s: float = 10.0) -> LoadReport:
    return LoadReport({}, duration_s, 3, records, slo, (50.0, 99.0))


def test_latencies_follow_their_definitions() -> None:
    """TPOT leaves the first token out, ITL is every gap, E2EL the whole; all in milliseconds."""
    one = report(answered(0, 0.1, [0.02, 0.04]), answered(1, 0.3, [0.06]), failed(2))
    assert one.ttft.mean_ms == pytest.approx(200)
    assert one.ttft.std_ms == pytest.approx(100)
    assert one.tpot.mean_ms == pytest.approx((30 + 60) / 2)
    assert one.itl.median_ms == pytest.approx(40)
    assert one.e2el.percentiles_ms == pytest.approx({50.0: 260, 99.0: 160 + 0.99 * 200})


def test_throughput_counts_answers_over_the_whole_run() -> None:
    """A failed request adds no tokens and no request."""
    one = report(answered(0, 0.1, [0.02, 0.04]), answered(1, 0.3, [0.06]), failed(2))
    assert (one.request_throughput, one.output_throughput) == pytest.approx((0.2, 0.5))
    assert one.total_token_throughput == pytest.approx(20.5)
    assert (len(one.answered), one.failed) == (2, 1)


def test_a_single_token_has_no_time_per_output_token() -> None:
    """It stays out of TPOT's distribution, and keeps any bound on TPOT."""
    one = report(answered(0, 0.1, []), answered(1, 0.1, [0.5]), slo=Slo(tpot_ms=50))
    assert one.tpot.mean_ms == pytest.approx(500)
    assert one.attainment == 0.5


def test_goodput_wants_every_bound_and_counts_failures_as_misses() -> None:
    """Four requests: one good, one slow to start, one slow to go on, one failed."""
    records = (answered(0, 0.1, [0.02]), answered(1, 0.9, [0.02]), answered(2, 0.1, [0.2]), failed(3))
    one = report(*records, slo=Slo.parse("ttft:500 tpot:50"))
    assert one.request_goodput == pytest.approx(0.1)
    assert one.attainment == 0.25
    assert report(*records, slo=Slo.parse("e2el:305")).attainment == 0.5
    assert report(*records).attainment is None


def test_a_late_generator_is_said_loudly() -> None:
    """Where the 99th percentile of the lag is beyond 20 ms and 2 % of the latency, and not otherwise."""
    late = report(*(answered(i, 0.1, [0.1], late_s=0.05) for i in range(10)))
    assert late.generator_late
    assert "BOTTLENECK" in late.warnings[0]
    assert "sent 50 ms late" in late.warnings[0]
    slow_server = report(*(answered(i, 5.0, [0.1], late_s=0.05) for i in range(10)))
    assert not slow_server.generator_late
    assert not slow_server.warnings


def test_several_tokens_in_a_chunk_are_said() -> None:
    """TPOT is per token, ITL stays the gap, and a note says so."""
    one = report(answered(0, 0.1, [0.08], tokens=5))
    assert one.tpot.mean_ms == pytest.approx(20)
    assert one.itl.mean_ms == pytest.approx(80)
    assert "2.50 tokens on average" in one.warnings[0]


def test_short_answers_guessed_counts_and_clipped_requests_are_said() -> None:
    """Each in one line with its number."""
    record = answered(0, 0.1, [0.1])
    record.asked_tokens, record.exact_tokens, record.clipped = 3, False, True
    assert [line.split()[0] for line in report(record).warnings] == ["1", "1", "1"]
    assert report(record).to_json()["clipped_requests"] == [0]


def test_json_has_vllms_names_and_no_nan() -> None:
    """Also where nothing was answered: what was not measured is null."""
    good = report(answered(0, 0.1, [0.02]), slo=Slo(ttft_ms=500)).to_json(records=True)
    assert good["mean_ttft_ms"] == pytest.approx(100)
    assert good["p99_itl_ms"] == pytest.approx(20)
    assert (good["completed"], good["records"][0]["itls_s"]) == (1, [0.02])
    assert good["slo"] == {"ttft_ms": 500, "tpot_ms": None, "e2el_ms": None}
    none = report(failed(0), failed(1), failed(2, "other")).to_json(records=True)
    json.dumps(none, allow_nan=False)
    assert none["median_e2el_ms"] is None
    assert none["errors"] == {"status 500: no": 2, "other": 1}


def test_the_table_shows_every_latency_and_why_requests_failed() -> None:
    """For people."""
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render_report(report(answered(0, 0.1234, [0.02]), failed(1), slo=Slo(ttft_ms=500))))
    text = console.export_text()
    assert all(word in text for word in ("TTFT", "TPOT", "ITL", "E2EL", "123.40", "50.0%", "1 failed: status 500: no"))
    console.print(render_report(report(failed(0))))
    assert "TTFT" not in console.export_text()


@pytest.mark.parametrize("text", ["ttft", "ttft:fast", "ttft:-1", "tbt:5", "ttft:1 ttft:2", " ", "ttft:nan"])
def test_a_bound_that_is_none_is_refused(text: str) -> None:
    """With an example of one that fits."""
    with pytest.raises(BenchError, match="ttft:500"):
        Slo.parse(text)


def test_percentiles_are_read_in_order() -> None:
    """From any order; what is none is refused."""
    assert parse_percentiles("99,50,99.9") == (50, 99, 99.9)
    for text in ("", "101", "p99", "nan"):
        with pytest.raises(BenchError, match="--percentiles"):
            parse_percentiles(text)


def test_a_percentile_keeps_its_digits_in_the_key() -> None:
    """p99.9 and p99 are two keys."""
    one = LoadReport({}, 1.0, 1, [answered(0, 0.1, [0.1])], None, (99.0, 99.9))
    assert {"p99_ttft_ms", "p99.9_ttft_ms"} <= set(one.to_json())
    assert not math.isnan(one.to_json()["p99.9_ttft_ms"])
