"""What moving requests is worth on simulated clusters: answers of which nobody knows the length, on replicas with
little memory. Routed in turn the load is as uneven as it gets; by ``predicted``, as the live cluster routes, migration
has the rest."""

import statistics
from collections.abc import Sequence
from typing import Any

import msgspec

from benchmarks.record import finish
from cluster.config import SloClass
from cluster.move import MoveOutcome
from cluster.simulator.arrivals import Synthetic, synthetic_arrivals
from cluster.simulator.scenario import Scenario
from cluster.simulator.simulation import Simulation
from replicas.engine_profile import load_profile

CLUSTERS = (4, 16, 256)
POLICIES = ("round-robin", "predicted")
REQUESTS, RATE = 250, 2.4
"""Of each replica: how many, and how many a second."""
SEEDS = {4: 9, 16: 5, 256: 1}
"""Loads that a cluster is given; a large one is many by itself."""


def simulate(replicas: int, policy: str, migration: bool, seed: int) -> dict[str, Any]:
    """The figures of one run."""
    profile = load_profile("llama-3.1-8b-h100")
    profile = msgspec.structs.replace(profile, device_bytes=profile.device_bytes // 10, max_model_len=8192)
    shape = Synthetic(
        requests=REQUESTS * replicas, rate=RATE * replicas, prompt_tokens=512, output_tokens=400, spread=1.3
    )
    arrivals = synthetic_arrivals(shape, seed, profile.max_model_len)
    classes = [SloClass(ttft_ms=1000.0, tpot_ms=60.0)]
    result = Simulation(
        Scenario(profile, replicas, policy, classes=classes, seed=seed, migration=migration), arrivals
    ).run()
    ttft = result.latencies()["ttft"]
    went = {str(one): sum(count for (_, end), count in result.moves.items() if end is one) for one in MoveOutcome}
    return {
        "attainment": round(result.account.total.attainment, 4),
        "median_ttft_ms": round(ttft.median_ms, 1),
        "p99_ttft_ms": round(ttft.percentiles_ms[99.0], 1),
        "preemptions": result.preemptions,
    } | went


def medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: statistics.median(one[key] for one in runs) for key in runs[0]}


def run() -> None:
    """All clusters, medians over loads; the last line is JSON, TTFT p99 without migration over that with it."""
    details: dict[str, Any] = {}
    headline: dict[str, float] = {}
    for replicas in CLUSTERS:
        for policy in POLICIES:
            stay, move = (
                medians([simulate(replicas, policy, migration, seed) for seed in range(SEEDS[replicas])])
                for migration in (False, True)
            )
            name = f"{replicas}, {policy}"
            details[name] = {"stay": stay, "move": move}
            headline[f"ttft_p99_ratio ({name})"] = round(stay["p99_ttft_ms"] / move["p99_ttft_ms"], 2)
            print(f"{name}: {stay} without, {move} with", flush=True)
    finish("migration_simulated", headline, details)
