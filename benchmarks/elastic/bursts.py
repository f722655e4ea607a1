"""Bursts: the same open loop at several rates to every variant; how much load each carries within its SLO.

The arrivals come in bunches (gamma intervals), or with the lengths and times of a trace, its time scaled to each rate.
The SLO is 25 times the latency of an engine with one request. A forecast of every variant at many rates
is the bound, and says at which rates to look.

goodput_ratio    highest rate at which 90 % keep the SLO, over A's
ttft_p99_ratio   A's TTFT p99 over ours at the rate where ours keeps 90 %, of requests that also keep TPOT

Ours is elastic memory with the host buffer, which has four times the device's bytes and sets requests aside
for prompts by that SLO.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.elastic.bounds import Job, advantage
from benchmarks.elastic.contest import Contest, Setting, contest
from benchmarks.elastic.forecast import Server, forecast
from benchmarks.elastic.outcome import Outcome, Panel
from benchmarks.elastic.race import race
from benchmarks.elastic.rate_curve import RatePoint, rate_at_target, ttft_at
from cluster.bench.arrivals import OpenLoop, Replay, due_times
from cluster.bench.report import Slo
from cluster.bench.traces import read_trace, trace_workload
from cluster.bench.workload import Workload, random_workload
from replicas.elastic_prefill import Objectives

LOAD_S, FEWEST, MOST = 80.0, 24, 64
"""Every rate has as many requests as arrive in LOAD_S, within bounds."""
SETTING = Setting(
    max_model_len=512,
    max_num_seqs=8,
    job=Job(requests=FEWEST, prompt=140, output=140),
    chunks=(128, 256, 512),
    batches=(1, 4),
    block_tokens=32,
    host_over_device=4.0,
    slo_over_unloaded=25.0,
)
OURS = "both"
BURSTINESS = 0.5
FORECAST_RATES = 24
MEASURED = 5
"""Rates that are measured: from below A's expected goodput to beyond ours."""
_LOWER = 3
"""How often the rate is halved for a variant that keeps its SLO at none of these."""
_LOST = 0.25
"""Attainment below which a variant is not measured at higher rates: its TTFT there counts as what it was."""
_IDLE_SHARE = 0.4
"""A variant is not measured at rates below this share of its expected goodput."""
SEED = 21


async def run(folder: Path, trace: Path | None = None) -> Outcome:
    """Calibrate, print the bound, run every rate. ``trace``: Azure CSV or Mooncake JSONL whose first requests are taken
    instead of random ones. ``folder``: for lease boards."""
    async with contest(SETTING, folder) as found:
        slo, servers = found.slo, _servers(found)
        expected = {name: _expected(server, trace, slo) for name, server in servers.items()}
        bound = {name: rate_at_target(points) for name, points in expected.items()}
        print(f"SLO: TTFT {slo.ttft_ms:.0f} ms, TPOT {slo.tpot_ms:.0f} ms")
        print("bound, requests/s: " + ", ".join(f"{name} {rate:.3f}" for name, rate in bound.items()), flush=True)
        curves = _Curves(found, trace)
        highest = 1.25 * bound[OURS]
        for rate in np.geomspace(0.8 * bound["A"], highest, MEASURED):
            names = [name for name in found.field if rate >= min(_IDLE_SHARE * bound[name], highest)]
            await curves.measure(rate, [name for name in names if not curves.lost(name)])
        for _ in range(_LOWER):
            if lost := [name for name, points in curves.points.items() if not rate_at_target(points)]:
                await curves.measure(min(curves.points[name][0].rate for name in lost) / 2, lost)
    goodput = {name: rate_at_target(points) for name, points in curves.points.items()}
    ttft = {name: ttft_at(points, goodput[OURS]) for name, points in curves.points.items()}
    expected_ttft = {name: ttft_at(points, bound[OURS]) for name, points in expected.items()}
    return Outcome(
        headline=advantage("goodput_ratio", goodput, OURS)
        | advantage("ttft_p99_ratio", ttft, OURS, lower_is_better=True),
        bounds=advantage("goodput_ratio", bound, OURS)
        | advantage("ttft_p99_ratio", expected_ttft, OURS, lower_is_better=True),
        details={
            **found.to_json(),
            "workload": curves.workload,
            "burstiness": None if trace else BURSTINESS,
            "bound_requests_per_s": bound,
            "goodput_requests_per_s": goodput,
            "ttft_p99_s_at_our_goodput": ttft,
            "curves": {name: [asdict(point) for point in points] for name, points in curves.points.items()},
        },
        panels=[
            Panel(
                title,
                unit,
                {name: [getattr(point, of) for point in points] for name, points in curves.points.items()},
                x={name: [point.rate for point in points] for name, points in curves.points.items()},
                x_label="offered requests/s",
            )
            for title, unit, of in (
                ("within the SLO", "share of requests", "attainment"),
                ("TTFT p99", "s", "ttft_p99_s"),
            )
        ],
    )


class _Curves:
    """What has been measured so far: ``points`` of each variant, by rate; ``workload`` of the last rate."""

    def __init__(self, found: Contest, trace: Path | None) -> None:
        self.points: dict[str, list[RatePoint]] = {name: [] for name in found.field}
        self.workload: dict[str, Any] = {}
        self._found = found
        self._trace = trace
        self._seed = SEED

    def lost(self, name: str) -> bool:
        """Whether the variant attains so little already that a higher rate says no more, and takes minutes."""
        return any(point.attainment < _LOST for point in self.points[name])

    async def measure(self, rate: float, names: Sequence[str]) -> None:
        """Offer ``rate`` requests a second to these variants; no prompt comes twice, so none is cached."""
        self._seed += 1
        work = _work(self._trace, rate, self._seed)
        field = {name: self._found.field[name] for name in names}
        reports = await race(field, work, _arrivals(work, self._trace, rate), SEED, self._found.slo)
        for name, report in reports.items():
            self.points[name].append(RatePoint.of(rate, report.records, self._found.slo))
            self.points[name].sort(key=lambda point: point.rate)
        found = {name: next(point for point in self.points[name] if point.rate == rate) for name in names}
        told = ", ".join(
            f"{name} {one.attainment:.0%} (TTFT p99 {one.ttft_p99_s:.1f} s)" for name, one in found.items()
        )
        print(f"{rate:.3f} requests/s, {len(work.requests)} requests: {told}", flush=True)
        self.workload = dict(work.settings)


def _servers(found: Contest) -> dict[str, Server]:
    """Each variant as the forecast sees it."""
    steps = dict.fromkeys(("B", "C", "host"), found.chunk) | dict.fromkeys(
        ("elastic", "both"), found.speed.fastest_step
    )
    steps["A"] = SETTING.max_model_len
    host_blocks = found.device.host_bytes // found.memory.block_bytes
    objectives = Objectives((found.slo.ttft_ms or 0.0) / 1000, (found.slo.tpot_ms or 0.0) / 1000)
    servers = {}
    for name, (device_bytes, step) in SETTING.room(found.device, found.chunk).items():
        prefill = found.speed.prefill_s[steps[name]]
        servers[name] = Server(
            blocks=found.memory.blocks(device_bytes, step) - 1,
            seqs=SETTING.max_num_seqs,
            token_s=prefill / SETTING.job.prompt,
            memory=found.memory,
            speed=found.speed,
            host_blocks=host_blocks if name in ("host", "both") else 0,
            objectives=objectives if name in ("host", "both") else None,
        )
    return servers


def _expected(server: Server, trace: Path | None, slo: Slo) -> list[RatePoint]:
    """The forecast at FORECAST_RATES rates, up to one that no place of the server could carry."""
    most = SETTING.max_num_seqs / (SETTING.job.output * server.speed.decode_step_s(SETTING.max_num_seqs, 0))
    points = []
    for rate in np.geomspace(most / 50, most, FORECAST_RATES):
        work = _work(trace, rate, SEED)
        dues = due_times(_arrivals(work, trace, rate), work.requests, SEED)
        points.append(RatePoint.of(rate, forecast(server, work.requests, dues), slo))
    return points


def _work(trace: Path | None, rate: float, seed: int) -> Workload:
    """Lengths and times do not depend on the seed, prompts do."""
    job, count = SETTING.job, round(min(max(rate * LOAD_S, FEWEST), MOST))
    if trace is None:
        return random_workload(count, input_len=job.prompt, output_len=job.output, seed=seed)
    return trace_workload(
        read_trace(trace, count),
        max_input_len=2 * job.prompt,
        max_output_len=job.output,
        seed=seed,
        origin=trace.name,
    )


def _arrivals(work: Workload, trace: Path | None, rate: float) -> OpenLoop | Replay:
    if trace is None:
        return OpenLoop(rate, BURSTINESS)
    return Replay(rate * (work.requests[-1].arrival_s or 0.0) / len(work.requests))
