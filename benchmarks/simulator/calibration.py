"""Simulated against measured: two real engines on this machine, and the same requests through the simulator.

    alone | burst | fit | trial | fit | trial | fit | trial | fit          time -->
    what    what
    is      the pair
    outside can do
    of steps

The step time is fitted to the steps of random requests at one load, in rounds around and between the trials, because
the speed of a shared machine changes within minutes. The trials have other requests, at other loads: Azure's and
Mooncake's traces where they are at hand, and longer random ones. Loads are shares of what the pair can do.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.simulator.pair import BLOCK_TOKENS, ENGINES, Pair, RoutedTarget, engine_spec, profile_of, running_pair
from cluster.bench.arrivals import ClosedLoop, OpenLoop, due_times
from cluster.bench.load import run_load
from cluster.bench.report import LoadReport
from cluster.bench.traces import read_trace, trace_workload
from cluster.bench.workload import Workload, random_workload
from cluster.simulator.arrivals import Arrival
from cluster.simulator.result import SimulationResult
from cluster.simulator.scenario import Scenario
from cluster.simulator.simulation import Simulation
from replicas.engine_profile import EngineProfile, save_profile
from replicas.step_time import StepWork, fit_step_time

_LONGEST_IN, _LONGEST_OUT = 400, 32
_FIT_CLIENTS = (2, 8, 4, 6)
"""Of the rounds in turn: decode batches of different sizes tell the parts of a step apart."""
_FIT_REQUESTS, _ALONE, _BURST = 10, 6, 16
_TRIAL_S = 60.0
"""A trial is as many requests as come in this time, within bounds."""
_FEWEST, _MOST = 15, 60
_SEED = 7


@dataclass(frozen=True)
class Trial:
    """Requests, and the load at which they come, in requests a second."""

    name: str
    work: Workload
    rate: float


@dataclass(frozen=True)
class Agreement:
    """Medians in milliseconds, and how far the simulated ones are off, relative to what was measured."""

    measured_ttft_ms: float
    simulated_ttft_ms: float
    measured_tpot_ms: float
    simulated_tpot_ms: float

    @property
    def ttft_error(self) -> float:
        return abs(self.simulated_ttft_ms / self.measured_ttft_ms - 1)

    @property
    def tpot_error(self) -> float:
        return abs(self.simulated_tpot_ms / self.measured_tpot_ms - 1)

    def to_json(self) -> dict[str, float]:
        return asdict(self) | {"ttft_error": self.ttft_error, "tpot_error": self.tpot_error}


async def calibrate(folder: Path, traces: Sequence[Path], profile_file: Path | None) -> dict[str, Any]:
    """Fit, measure and simulate. ``profile_file``: where the fitted profile is written to."""
    spec = engine_spec()
    async with running_pair(spec, folder) as pair:
        overhead_s = await _overhead_s(pair)
        capacity = _BURST / (await run_load(RoutedTarget(pair, _SEED), _random(_BURST, 1), OpenLoop())).duration_s
        print(
            f"the pair answers {capacity:.2f} requests/s at most, {1000 * overhead_s:.1f} ms outside of steps",
            flush=True,
        )
        steps: list[tuple[StepWork, float]] = []
        measured: list[tuple[Trial, LoadReport]] = []
        for number, trial in enumerate([*_trials(traces, capacity), None]):
            since_s = time.monotonic()
            clients = ClosedLoop(_FIT_CLIENTS[number % len(_FIT_CLIENTS)])
            await run_load(RoutedTarget(pair, _SEED), _random(_FIT_REQUESTS, 10 + number), clients)
            steps += pair.steps(since_s)
            if trial is not None:
                measured.append((trial, await _measure(pair, trial)))
                print(f"{trial.name}: measured", flush=True)
    step_time = fit_step_time([work for work, _ in steps], [seconds for _, seconds in steps])
    source = (
        "SmolLM2-135M-Instruct in bfloat16, vLLM 0.32, one of two elastic engines that share two cores of an AMD EPYC; "
        f"fitted to {len(steps)} steps by `make bench-simulator`."
    )
    profile = profile_of(spec, step_time, overhead_s, source)
    print(f"fitted to {len(steps)} steps: {step_time}", flush=True)
    trials = {trial.name: _compared(profile, trial, report, capacity) for trial, report in measured}
    if profile_file is not None:
        save_profile(profile, profile_file)
    return {
        "ttft_error": max(one["ttft_error"] for one in trials.values()),
        "tpot_error": max(one["tpot_error"] for one in trials.values()),
        "trials": trials,
        "capacity_requests_per_s": capacity,
        "step_time": asdict(step_time),
        "step_median_error": statistics.median(abs(step_time.seconds(work) / s - 1) for work, s in steps),
        "steps": len(steps),
        "overhead_s": overhead_s,
    }


async def _overhead_s(pair: Pair) -> float:
    """Seconds of a request until its first token that are no step: of lone ones, whose prompts are one step each."""
    since_s = time.monotonic()
    report = await run_load(RoutedTarget(pair, _SEED), _random(_ALONE, 2), ClosedLoop(1))
    prompts = [seconds for _began_s, work, seconds in sorted(pair.steps_in_time(since_s), key=_began) if work.tokens]
    ttfts = [record.ttft_s for record in report.records]
    return max(0.0, statistics.median(ttft_s - s for ttft_s, s in zip(ttfts, prompts, strict=True)))


def _began(step: tuple[float, StepWork, float]) -> float:
    return step[0]


def _random(requests: int, seed: int, input_len: int = 200, output_len: int = 20) -> Workload:
    return random_workload(requests, input_len=input_len, output_len=output_len, range_ratio=0.8, seed=seed)


def _trials(traces: Sequence[Path], capacity: float) -> list[Trial]:
    """Each at its own load. The traces' prompts are about twice as long as the random ones that capacity was measured
    with."""
    found = []
    for path, load in zip(traces, (0.3, 0.45), strict=False):
        rate = load * capacity
        rows = read_trace(path, _count(rate))
        work = trace_workload(rows, max_input_len=_LONGEST_IN, max_output_len=_LONGEST_OUT, origin=path.name)
        found.append(Trial(path.stem, work, rate))
    rate = 0.6 * capacity
    return [*found, Trial("random, denser", _random(_count(rate), _SEED + 1), rate)]


def _count(rate: float) -> int:
    return min(max(round(rate * _TRIAL_S), _FEWEST), _MOST)


async def _measure(pair: Pair, trial: Trial) -> LoadReport:
    report = await run_load(RoutedTarget(pair, _SEED), trial.work, OpenLoop(trial.rate), seed=_SEED)
    assert not report.failed, report.errors
    return report


def _simulate(profile: EngineProfile, trial: Trial) -> SimulationResult:
    """The same requests at the same times. Prefix blocks are a KV block's tokens, by what they are."""
    requests = trial.work.requests
    dues = due_times(OpenLoop(trial.rate), requests, _SEED)
    ids: dict[bytes, int] = {}
    arrivals = []
    for request, due_s in zip(requests, dues, strict=True):
        whole = len(request.prompt) // BLOCK_TOKENS
        prefix = [request.prompt[: (n + 1) * BLOCK_TOKENS].tobytes() for n in range(whole)]
        known = tuple(ids.setdefault(one, len(ids)) for one in prefix)
        arrivals.append(Arrival(due_s, len(request.prompt), request.output_len, known))
    scenario = Scenario(profile, ENGINES, "load", per_node=ENGINES, seed=_SEED)
    return Simulation(scenario, arrivals, BLOCK_TOKENS).run()


def _compared(profile: EngineProfile, trial: Trial, report: LoadReport, capacity: float) -> dict[str, Any]:
    simulated = _simulate(profile, trial).latencies()
    one = Agreement(
        report.ttft.median_ms, simulated["ttft"].median_ms, report.tpot.median_ms, simulated["tpot"].median_ms
    )
    print(
        f"{trial.name}, {trial.rate:.2f}/s: TTFT {one.measured_ttft_ms:.0f} ms measured, {one.simulated_ttft_ms:.0f} "
        f"simulated ({one.ttft_error:.0%}); TPOT {one.measured_tpot_ms:.1f}, {one.simulated_tpot_ms:.1f} "
        f"({one.tpot_error:.0%})",
        flush=True,
    )
    load = {"requests": len(trial.work.requests), "rate": trial.rate, "load": trial.rate / capacity}
    return one.to_json() | load
