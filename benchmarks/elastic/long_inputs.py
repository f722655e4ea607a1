"""Long inputs, few outputs, tight budget: how many requests are held at once, and how fast they decode.

The requests are a little over half as long as the longest one that A must be able to serve. All are there at the start.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from benchmarks.elastic.bounds import Job, advantage
from benchmarks.elastic.contest import Setting, contest
from benchmarks.elastic.outcome import Outcome, Panel
from benchmarks.elastic.process_memory import WorkerPeak
from benchmarks.elastic.race import race
from benchmarks.elastic.step_log import DecodeFigures, decode_figures
from benchmarks.elastic.variants import MIB
from cluster.bench.arrivals import OpenLoop
from cluster.bench.report import LoadReport
from cluster.bench.workload import random_workload
from memory_agent.lease_board import EngineWord

SETTING = Setting(
    max_model_len=4096,
    max_num_seqs=8,
    job=Job(requests=4, prompt=2048, output=64),
    chunks=(256, 512, 1024, 4096),
    batches=(1, 3),
)
TABLE_TOKENS = (512, 1024, SETTING.job.request_tokens, SETTING.max_model_len)
SEED = 11
LEFT_ON_THE_BOARD = (
    EngineWord.BLOCKS_MAPPED,
    EngineWord.TOKEN_BUDGET,
    EngineWord.ACTIVATION_BYTES,
    EngineWord.ACTIVATION_HELD_BYTES,
    EngineWord.PREEMPTIONS,
)
"""What the elastic engine's last steps tell about how it divided its lease."""


async def run(folder: Path) -> Outcome:
    """Calibrate, print the bounds, run all variants in turns. ``folder``: for lease boards."""
    job = SETTING.job
    async with contest(SETTING, folder) as found:
        table = {t: SETTING.held(found.memory, found.device, found.chunk, t) for t in TABLE_TOKENS}
        held = {name: min(count, job.requests) for name, count in found.held.items()}
        rates = {name: found.speed.decode_rate(count, job.context) for name, count in held.items()}
        _print_bounds(table, rates)
        peaks = {name: WorkerPeak(one.engine) for name, one in found.field.items()}
        work = random_workload(job.requests, input_len=job.prompt, output_len=job.output, seed=SEED)
        reports = await race(found.field, work, OpenLoop(), SEED)
        peak_bytes = {name: peak.read() for name, peak in peaks.items()}
        words = {word.name: found.field["elastic"].engine.word(word) for word in LEFT_ON_THE_BOARD}
        figures = {name: decode_figures(one.log.steps) for name, one in found.field.items()}
    for name, report in reports.items():
        print(_line(name, figures[name], report, peak_bytes[name]), flush=True)
    held_figures = {name: one.held for name, one in figures.items()}
    rate_figures = {name: one.tokens_per_s for name, one in figures.items()}
    return Outcome(
        headline=advantage("concurrency_ratio", held_figures) | advantage("decode_throughput_ratio", rate_figures),
        bounds=advantage("concurrency_ratio", held) | advantage("decode_throughput_ratio", rates),
        details={
            **found.to_json(),
            "decode_bound_tokens_per_s": rates,
            "held_by_request_tokens": table,
            "figures": {name: asdict(one) for name, one in figures.items()},
            "worker_peak_bytes": peak_bytes,
            "elastic_board": words,
            "reports": {name: report.to_json() for name, report in reports.items()},
        },
        panels=[
            Panel("held at once", "requests", {name: [v] for name, v in held_figures.items()}, bounds=held),
            Panel("decode", "tokens/s", {name: [v] for name, v in rate_figures.items()}, bounds=rates),
        ],
    )


def _print_bounds(table: Mapping[int, Mapping[str, int]], rates: Mapping[str, float]) -> None:
    for tokens, held in table.items():
        print(f"bound, requests of {tokens} tokens held: " + ", ".join(f"{name} {n}" for name, n in held.items()))
    print("bound, decoded tokens/s: " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()), flush=True)


def _line(name: str, figures: DecodeFigures, report: LoadReport, peak_bytes: int) -> str:
    return (
        f"{name}: held {figures.held:.2f}, decode {figures.tokens_per_s:.1f} tok/s ({figures.step_ms:.0f} ms a step), "
        f"all in {report.duration_s:.0f} s ({report.output_throughput:.1f} tok/s), TTFT median "
        f"{report.ttft.median_ms / 1000:.1f} s, {figures.preemptions} preemptions, "
        f"worker's peak {peak_bytes / MIB:.0f} MiB with weights"
    )
