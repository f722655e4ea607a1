"""Routing policies against each other, each on the same requests: a trace where it is at hand, and made-up bursts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.bench.traces import read_trace
from cluster.config import SloClass
from cluster.simulator.arrivals import Arrival, Synthetic, synthetic_arrivals, trace_arrivals
from cluster.simulator.render import render_comparison
from cluster.simulator.scenario import Scenario
from cluster.simulator.sim_router import POLICIES
from cluster.simulator.simulation import Simulation
from replicas.engine_profile import EngineProfile, load_profile


@dataclass(frozen=True)
class Case:
    """Requests, and the cluster that gets them."""

    name: str
    arrivals: Sequence[Arrival]
    replicas: int
    slo: SloClass
    routers: int = 1


def compare(mooncake: Path | None) -> dict[str, Any]:
    """Every policy on every case; figures by case and policy."""
    profile = load_profile("llama-3.1-8b-h100")
    found: dict[str, Any] = {}
    for case in _cases(profile, mooncake):
        scenarios = [
            Scenario(profile, case.replicas, policy, routers=case.routers, classes=[case.slo]) for policy in POLICIES
        ]
        results = [Simulation(scenario, case.arrivals).run() for scenario in scenarios]
        print(
            f"== {case.name}: {len(case.arrivals)} requests, {case.replicas} replicas, {case.routers} routers",
            flush=True,
        )
        Console(width=100).print(render_comparison(results))
        figures = {}
        for result in results:
            total, latencies = result.account.total, result.latencies()
            figures[result.scenario.policy] = {
                "attainment": total.attainment,
                "goodput_requests_per_s": total.kept / result.duration_s,
                "median_ttft_ms": latencies["ttft"].median_ms,
                "p99_ttft_ms": latencies["ttft"].percentiles_ms[99.0],
                "median_tpot_ms": latencies["tpot"].median_ms,
                "p99_tpot_ms": latencies["tpot"].percentiles_ms[99.0],
                "prefix_hit_share": result.hit_share,
            }
        found[case.name] = {
            "requests": len(case.arrivals),
            "replicas": case.replicas,
            "routers": case.routers,
            "ttft_ms": case.slo.ttft_ms,
            "tpot_ms": case.slo.tpot_ms,
            "policies": figures,
        }
    return found


def _cases(profile: EngineProfile, mooncake: Path | None) -> list[Case]:
    bursts = Synthetic(
        requests=6000, rate=64.0, burst_factor=4.0, burst_s=5.0, calm_s=20.0, prefix_tokens=2048, prefixes=64
    )
    steady = Synthetic(requests=6000, rate=80.0)
    chat, tight = SloClass(ttft_ms=2000.0, tpot_ms=50.0), SloClass(ttft_ms=500.0, tpot_ms=40.0)
    made_up = synthetic_arrivals(bursts, 1, profile.max_model_len)
    cases = [
        Case("bursts with prefixes", made_up, 8, tight),
        Case("bursts with prefixes, 8 routers", made_up, 8, tight, routers=8),
        Case("steady, no prefixes", synthetic_arrivals(steady, 2, profile.max_model_len), 6, tight),
    ]
    if mooncake is not None:
        rows = read_trace(mooncake)
        cases = [
            Case("Mooncake, 6 replicas", trace_arrivals(rows, profile.max_model_len), 6, chat),
            Case("Mooncake, twice as fast, 12 replicas", trace_arrivals(rows, profile.max_model_len, 2.0), 12, chat),
            *cases,
        ]
    return cases
