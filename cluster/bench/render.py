"""Shows a report to people: the tables of ``ellm bench``."""

import math

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.bench.report import Latencies, LoadReport

_REASONS_SHOWN = 5


def render_report(report: LoadReport) -> RenderableType:
    """Counts and rates, latencies, why requests failed, and warnings, for any rich console."""
    parts: list[RenderableType] = [_figures(report)]
    if report.answered:
        parts.append(_latency_table(report))
    for reason, count in list(report.errors.items())[:_REASONS_SHOWN]:
        parts.append(Text(f"{count} failed: {reason}", style="red"))
    parts += [
        Text(f"note: {warning}", style="bold red" if report.generator_late else "yellow") for warning in report.warnings
    ]
    return Group(*parts)


def _figures(report: LoadReport) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    lag = report.schedule_lag
    table.add_row("requests answered, failed", f"{len(report.answered)}, {report.failed}")
    table.add_row("duration (s)", f"{report.duration_s:.2f}")
    table.add_row("input, output tokens", f"{report.total_input_tokens}, {report.total_output_tokens}")
    table.add_row("request throughput (req/s)", f"{report.request_throughput:.3f}")
    table.add_row("output throughput (tok/s)", f"{report.output_throughput:.2f}")
    table.add_row("total token throughput (tok/s)", f"{report.total_token_throughput:.2f}")
    if report.request_goodput is not None and report.attainment is not None:
        table.add_row("request goodput (req/s)", f"{report.request_goodput:.3f}")
        table.add_row("SLO attainment, of all requests", f"{report.attainment:.1%}")
    table.add_row("most requests in flight", str(report.max_concurrent_requests))
    if lag is not None:
        shown = f"{lag.median_ms:.1f}, {lag.percentiles_ms[99.0]:.1f}, {lag.percentiles_ms[100.0]:.1f}"
        table.add_row("sent late by: median, p99, max (ms)", shown)
    return table


def _latency_table(report: LoadReport) -> Table:
    table = Table(title="\nLatency (ms)", title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("")
    for column in ("mean", "median", "std", *(f"p{percentile:g}" for percentile in report.percentiles)):
        table.add_column(column, justify="right", no_wrap=True)
    rows: tuple[tuple[str, Latencies], ...] = (
        ("TTFT", report.ttft),
        ("TPOT", report.tpot),
        ("ITL", report.itl),
        ("E2EL", report.e2el),
    )
    for name, latencies in rows:
        values = (latencies.mean_ms, latencies.median_ms, latencies.std_ms, *latencies.percentiles_ms.values())
        table.add_row(name, *("-" if math.isnan(value) else f"{value:.2f}" for value in values))
    return table
