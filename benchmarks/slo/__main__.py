"""`python -m benchmarks.slo`: results/slo.json, and a last line of JSON.

attainment_ratio        requests that keep all of their targets, with the controller's targets over without them: same
                        load, same cluster, in turns
overload_goodput_ratio  good short requests a second at three times the load that the cluster can take, over at that
                        load

Two real replicas share this machine and a budget; the load goes through the API. Without its targets a replica's steps
and batches are as large as its settings allow. ``--simulate`` runs the load on simulated replicas alone, and records
nothing.
"""

import argparse
import asyncio
import json
import os
import socket
import sys
from dataclasses import asdict
from typing import Any

from benchmarks.record import finish
from benchmarks.slo.load import INTERACTIVE, MixedLoad, Shape
from benchmarks.slo.served import (
    ENGINES,
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    api_target,
    cluster_config,
    decisions,
    learned_step_time,
    switch_targets,
)
from benchmarks.slo.simulated import simulate
from cluster.bench.arrivals import ClosedLoop, Replay
from cluster.bench.load import run_load
from cluster.launcher import LocalCluster
from replicas.step_time import StepTime

_ASSUMED = StepTime(step_s=0.03, row_s=1e-3, kv_token_s=3e-6, token_s=1.2e-3, pair_s=1e-6)
"""Until the engines have told: the load that warms them up."""
_WARM_UP_S = 25.0
_CLIENTS = 12
"""Who keep the cluster as busy as it can be."""
_OVERLOAD = 3.0


async def measure(url: str, seconds: float, turns: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Headline and details."""
    await _run(url, Shape.of(_ASSUMED, ENGINES), _WARM_UP_S, 1000)
    step = learned_step_time()
    shape = Shape.of(step, ENGINES)
    print(f"steps: {step}\nload: {shape.to_json()}", flush=True)
    found: dict[str, list[dict[str, Any]]] = {"without": [], "with": []}
    for turn in range(turns):
        for name, of in found.items():
            switch_targets(name == "with")
            of.append(await _run(url, shape, seconds, 2 * turn + (name == "with")))
            print(f"turn {turn}, {name} targets: {of[-1]}", flush=True)
    attainment = {name: sum(one["kept"] for one in of) / sum(one["of"] for one in of) for name, of in found.items()}
    told = decisions()
    capacity = await _capacity(url, shape, seconds)
    at_capacity = await _run(url, shape, seconds, 101, capacity)
    overloaded = await _run(url, shape, seconds, 102, _OVERLOAD * capacity)
    print(f"at capacity, {capacity:.2f} times the load: {at_capacity}\n{_OVERLOAD:g} times that: {overloaded}")
    headline = {
        "attainment_ratio": round(attainment["with"] / attainment["without"], 3),
        "overload_goodput_ratio": round(
            overloaded["goodput_per_s"][INTERACTIVE] / at_capacity["goodput_per_s"][INTERACTIVE], 3
        ),
    }
    return headline, {
        "step_time": asdict(step),
        "load": shape.to_json(),
        "turns": found,
        "attainment": attainment,
        "decisions": told,
        "capacity_factor": capacity,
        "at_capacity": at_capacity,
        "overloaded": overloaded,
    }


async def _run(url: str, shape: Shape, seconds: float, turn: int, factor: float = 1.0) -> dict[str, Any]:
    """The load once; what came of it."""
    load = MixedLoad.made(shape, seconds, turn, factor)
    async with api_target(url, shape, load.classes) as target:
        report = await run_load(target, load.work, Replay())
    kept = load.kept(report, shape)
    return {
        "kept": sum(count for count, _ in kept.values()),
        "of": len(load.classes),
        "attainment": {name: count / of if of else None for name, (count, of) in kept.items()},
        "goodput_per_s": {name: count / seconds for name, (count, _) in kept.items()},
        "failed": report.failed,
        "ttft_ms": {"median": report.ttft.median_ms, **report.ttft.percentiles_ms},
        "tpot_ms": {"median": report.tpot.median_ms, **report.tpot.percentiles_ms},
        "duration_s": report.duration_s,
    }


async def _capacity(url: str, shape: Shape, seconds: float) -> float:
    """How many times the load the cluster can take: by clients that wait for each answer."""
    load = MixedLoad.made(shape, seconds, 100)
    async with api_target(url, shape, load.classes) as target:
        report = await run_load(target, load.work, ClosedLoop(_CLIENTS))
    return seconds / report.duration_s


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slo")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run")
    parser.add_argument("--turns", type=int, default=2, help="runs with and without targets, each")
    parser.add_argument("--simulate", action="store_true", help="on simulated replicas, in seconds")
    options = parser.parse_args()
    if options.simulate:
        print(json.dumps(simulate(options.seconds, options.turns, MAX_NUM_SEQS, MAX_MODEL_LEN)))
        return
    config = cluster_config(_free_port(), Shape.of(_ASSUMED, ENGINES))
    cluster = LocalCluster(config, lambda stage, at_s, line: print(f"  {stage:<9}{at_s:6.1f} s  {line}", flush=True))
    try:
        cluster.start()
        headline, details = asyncio.run(measure(cluster.url, options.seconds, options.turns))
        finish("slo", headline, details)
    finally:
        cluster.stop()
        sys.stdout.flush()
    # Not a plain return: Ray's exit handlers wait a minute where its cluster was killed.
    os._exit(0)


if __name__ == "__main__":
    main()
