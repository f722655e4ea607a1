"""Simulated against measured: two real engines on this machine, and the same requests through the simulator.

The step time is fitted to steps under random requests at one load; the runs that are compared have other requests, at
other loads: Azure's and Mooncake's traces where they are at hand, and made up ones in their shape.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.simulator.pair import BLOCK_TOKENS, ENGINES, RoutedTarget, engine_spec, profile_of, running_pair
from cluster.bench.arrivals import OpenLoop, due_times
from cluster.bench.load import run_load
from cluster.bench.report import LoadReport
from cluster.bench.traces import read_trace, trace_workload
from cluster.bench.workload import Workload, random_workload
from cluster.simulator.arrivals import Arrival
from cluster.simulator.result import SimulationResult
from cluster.simulator.scenario import Scenario
from cluster.simulator.simulation import Simulation
from replicas.engine_profile import EngineProfile, save_profile
from replicas.step_time import fit_step_time

_FIT_REQUESTS, _FIT_RATE = 90, 1.2
_LONGEST_IN, _LONGEST_OUT = 640, 48
_SEED = 7


@dataclass(frozen=True)
class Trial:
    """Requests and a load that are compared. Lengths are clipped to what two cores can serve in a minute."""

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
        since_s = time.monotonic()
        fit = Trial("random", _random(_FIT_REQUESTS), _FIT_RATE)
        fitted_on = await _measure(RoutedTarget(pair, _SEED), fit)
        steps = pair.steps(since_s)
        step_time = fit_step_time([work for work, _ in steps], [seconds for _, seconds in steps])
        source = (
            "SmolLM2-135M-Instruct in bfloat16, vLLM 0.32, one of two elastic engines that share the two cores of an "
            f"AMD EPYC; fitted to {len(steps)} steps by `make bench-simulator`."
        )
        bare = profile_of(spec, step_time, 0.0, source)
        overhead_s = max(0.0, (fitted_on.ttft.median_ms - _simulate(bare, fit).latencies()["ttft"].median_ms) / 1000)
        profile = profile_of(spec, step_time, overhead_s, source)
        print(f"fitted to {len(steps)} steps: {step_time}, {1000 * overhead_s:.1f} ms outside of steps", flush=True)
        trials: dict[str, Any] = {fit.name + " (fitted)": _compare(profile, fit, fitted_on).to_json()}
        for trial in _trials(traces):
            report = await _measure(RoutedTarget(pair, _SEED), trial)
            agreement = _compare(profile, trial, report)
            trials[trial.name] = agreement.to_json() | {"rate": trial.rate, "requests": len(trial.work.requests)}
            print(
                f"{trial.name}, {trial.rate:g}/s: TTFT {agreement.measured_ttft_ms:.0f} ms measured, "
                f"{agreement.simulated_ttft_ms:.0f} simulated ({agreement.ttft_error:.0%}); TPOT "
                f"{agreement.measured_tpot_ms:.1f}, {agreement.simulated_tpot_ms:.1f} ({agreement.tpot_error:.0%})",
                flush=True,
            )
    if profile_file is not None:
        save_profile(profile, profile_file)
    compared = [one for name, one in trials.items() if not name.endswith("(fitted)")]
    residuals = [abs(step_time.seconds(work) / seconds - 1) for work, seconds in steps]
    return {
        "ttft_error": max(one["ttft_error"] for one in compared),
        "tpot_error": max(one["tpot_error"] for one in compared),
        "trials": trials,
        "step_time": asdict(step_time),
        "step_median_error": statistics.median(residuals),
        "steps": len(steps),
        "overhead_s": overhead_s,
    }


def _random(requests: int, seed: int = _SEED) -> Workload:
    return random_workload(requests, input_len=320, output_len=28, range_ratio=0.9, seed=seed)


def _trials(traces: Sequence[Path]) -> list[Trial]:
    """Each at its own load, below and above that of the fit."""
    found = [
        Trial(
            path.stem,
            trace_workload(
                read_trace(path, requests), max_input_len=longest, max_output_len=_LONGEST_OUT, origin=path.name
            ),
            rate,
        )
        for path, requests, longest, rate in zip(
            traces, (60, 60), (_LONGEST_IN, 2 * _LONGEST_IN), (0.6, 0.8), strict=False
        )
    ]
    return [*found, Trial("random, denser", _random(70, _SEED + 1), 1.6)]


async def _measure(target: RoutedTarget, trial: Trial) -> LoadReport:
    report = await run_load(target, trial.work, OpenLoop(trial.rate), seed=_SEED)
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


def _compare(profile: EngineProfile, trial: Trial, report: LoadReport) -> Agreement:
    simulated = _simulate(profile, trial).latencies()
    return Agreement(
        report.ttft.median_ms, simulated["ttft"].median_ms, report.tpot.median_ms, simulated["tpot"].median_ms
    )
