"""No pressure: what elasticity costs where memory is plentiful. Closed loop, mixed lengths, several rounds in turns.

no_pressure_throughput_ratio   output tokens/s over A's; median over rounds
scheduler_added_share          scheduler time that the elastic engine adds to a step, over the step
moves_share                    workers' time in mapping and unmapping, over the time of all steps
"""

import statistics
from pathlib import Path

from benchmarks.elastic.bounds import advantage
from benchmarks.elastic.outcome import Outcome, Panel
from benchmarks.elastic.race import Racer, race, racers
from benchmarks.elastic.timed_scheduler import SchedulerTimes
from benchmarks.elastic.variants import bench_model, elastic_spec, static_spec
from cluster.bench.arrivals import ClosedLoop
from cluster.bench.workload import random_workload

MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 32
CLIENTS = 16
CHUNK = 512
KV_BLOCKS = 160
"""More than CLIENTS longest requests ever fill."""
ROUNDS, REQUESTS = 4, 16
INPUT, OUTPUT, RANGE = 224, 56, 0.7


async def run(folder: Path) -> Outcome:
    """Run rounds after one that warms up. ``folder``: for lease boards and scheduler times."""
    model = bench_model(MAX_MODEL_LEN)
    ceiling_bytes = 2 * KV_BLOCKS * model.block_bytes
    specs = {
        "A": static_spec(model, MAX_NUM_SEQS, KV_BLOCKS, MAX_MODEL_LEN),
        "B": static_spec(model, MAX_NUM_SEQS, KV_BLOCKS, CHUNK),
        "elastic": elastic_spec(model, MAX_NUM_SEQS, ceiling_bytes, MAX_MODEL_LEN),
    }
    async with racers(specs, folder, time_schedulers=True) as field:
        rates: dict[str, list[float]] = {name: [] for name in field}
        await _round(field, 0)
        before = _scheduler_times(field)
        moves_before_ns = field["elastic"].engine.moves_ns()
        for racer in field.values():
            racer.log.steps.clear()
        for number in range(1, ROUNDS + 1):
            for name, rate in (await _round(field, number)).items():
                rates[name].append(rate)
            print(f"round {number}: " + ", ".join(f"{n} {r[-1]:.1f} tok/s" for n, r in rates.items()), flush=True)
        scheduler_us = {name: times.us_a_step_since(before[name]) for name, times in _scheduler_times(field).items()}
        moves_ns = field["elastic"].engine.moves_ns() - moves_before_ns
        steps_s = {name: [s.seconds for s in racer.log.steps if s.seconds] for name, racer in field.items()}
        added = (scheduler_us["elastic"] - scheduler_us["A"]) / 1e6 / statistics.mean(steps_s["elastic"])
        moves = moves_ns / 1e9 / sum(steps_s["elastic"])
        print(
            "scheduler, us a step: "
            + ", ".join(f"{name} {value:.0f}" for name, value in scheduler_us.items())
            + f"; added {added:.2%} of a step; mapping and unmapping {moves:.2%}"
        )
    ratio = "no_pressure_throughput_ratio"
    rounds = [advantage(ratio, {name: rate[i] for name, rate in rates.items()}) for i in range(ROUNDS)]
    medians = {name: statistics.median(one[name] for one in rounds) for name in (ratio, f"{ratio}_vs_best")}
    return Outcome(
        headline=medians | {"scheduler_added_share": added, "moves_share": moves},
        bounds=dict.fromkeys(medians, 1.0),
        details={
            "tokens_per_s": rates,
            "scheduler_us_a_step": scheduler_us,
            "mean_step_ms": {name: 1000 * statistics.mean(seconds) for name, seconds in steps_s.items()},
            "clients": CLIENTS,
            "requests_a_round": REQUESTS,
        },
        panels=[Panel("no pressure", "tokens/s", {name: [statistics.median(rate)] for name, rate in rates.items()})],
    )


async def _round(field: dict[str, Racer], seed: int) -> dict[str, float]:
    """Output tokens a second of each racer; no prompt comes twice."""
    work = random_workload(REQUESTS, input_len=INPUT, output_len=OUTPUT, range_ratio=RANGE, seed=seed)
    reports = await race(field, work, ClosedLoop(CLIENTS), seed)
    return {name: report.output_throughput for name, report in reports.items()}


def _scheduler_times(field: dict[str, Racer]) -> dict[str, SchedulerTimes]:
    return {name: SchedulerTimes.read(racer.times) for name, racer in field.items() if racer.times}
