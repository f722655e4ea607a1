"""What a simulation and a planning round cost as the cluster grows, on one core."""

import statistics
import time
from typing import Any

from cluster.config import SloClass
from cluster.simulator.arrivals import Arrival, Synthetic, synthetic_arrivals
from cluster.simulator.scenario import Scenario
from cluster.simulator.simulation import Simulation
from replicas.engine_profile import load_profile

REPLICAS = (10, 100, 1000, 5000)
REQUESTS_EACH, REQUESTS_MOST = 100, 100_000
"""A replica, and of the whole run."""
RATE_EACH = 5.0
"""Requests a second and replica."""
_ROUNDS = 9


def measure(replicas: int) -> dict[str, Any]:
    """Seconds of processor time of a whole run, and milliseconds of planning rounds in the state that it ends in."""
    scenario, arrivals = _setting(replicas)
    simulation = Simulation(scenario, arrivals)
    began_s, wall_s = time.process_time(), time.perf_counter()
    result = simulation.run()
    seconds, wall = time.process_time() - began_s, time.perf_counter() - wall_s
    rounds = simulation.time_planning(_ROUNDS, time.process_time)
    found = {
        "replicas": replicas,
        "requests": len(arrivals),
        "seconds": seconds,
        "wall_s": wall,
        "us_a_request": 1e6 * seconds / len(arrivals),
        "simulated_s": result.duration_s,
        "attainment": result.account.total.attainment,
        "plan_ms": 1000 * statistics.median(rounds),
        "ttft_prediction_error": result.ttft_error.median,
        "tpot_prediction_error": result.tpot_error.median,
    }
    print(
        f"{replicas} replicas, {len(arrivals)} requests: {seconds:.1f} s ({found['us_a_request']:.0f} us a request), a "
        f"planning round {found['plan_ms']:.1f} ms, attainment {found['attainment']:.1%}",
        flush=True,
    )
    return found


def _setting(replicas: int) -> tuple[Scenario, list[Arrival]]:
    profile = load_profile("llama-3.1-8b-h100")
    shape = Synthetic(
        requests=min(REQUESTS_EACH * replicas, REQUESTS_MOST),
        rate=RATE_EACH * replicas,
        burst_factor=2.0,
        prefix_tokens=1024,
        prefixes=5 * replicas,
    )
    scenario = Scenario(
        profile,
        replicas,
        classes=[SloClass(ttft_ms=500.0, tpot_ms=50.0)],
        batch_sizing=True,
        scaling=True,
        replicas_most=replicas,
    )
    return scenario, synthetic_arrivals(shape, 0, profile.max_model_len)
