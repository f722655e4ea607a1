"""Elastic memory on an NVIDIA GPU against stock vLLM: long inputs, and no pressure. The last line is JSON.

The engines are vLLM's own, with random weights in the shape of Llama 3.2 1B, so nothing is downloaded. All get the same
device bytes: what A needs for its longest request, the activations of its whole prompt in one step and its KV memory.

    A        stock vLLM whose steps take a longest prompt whole: the paper's baseline
    B        stock vLLM with chunked prefill at vLLM's default for GPUs of this size
    elastic  KV memory and activations share the bytes

Engines run one after another, each alone; those that wait their turn are idle and hold what they hold.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm.third_party import pynvml

from benchmarks.elastic.bounds import Job, advantage, fit_memory
from benchmarks.elastic.engine_target import EngineTarget
from benchmarks.elastic.race import warm_up
from benchmarks.elastic.step_log import StepLog, decode_figures
from benchmarks.elastic.timed_scheduler import SchedulerTimes, timed
from benchmarks.elastic.variants import MIB, BenchModel, elastic_spec, static_spec
from benchmarks.record import finish
from cluster.bench.arrivals import Arrivals, ClosedLoop, OpenLoop
from cluster.bench.clock import WallClock
from cluster.bench.load import run_load
from cluster.bench.report import LoadReport
from cluster.bench.workload import Workload, random_workload
from cluster.models import ModelFacts
from memory_agent.lease_board import EngineWord
from replicas.environment import environment
from replicas.local_engine import Instruments, LocalEngine, local_engine
from replicas.spec import EngineSpec
from replicas.step_memory import Memory

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 16, 2048, 8192, 32, 8, 64, 128_256
MAX_MODEL_LEN, MAX_NUM_SEQS, BLOCK_TOKENS = 131_072, 16, 16
CHUNK = 8192
JOB = Job(requests=8, prompt=66_000, output=256)
"""A little over half as long as the longest that A must be able to serve."""
PEAK_TOKENS = (8192, MAX_MODEL_LEN - 1)
CLIENTS, ROUNDS, REQUESTS = 16, 4, 32
INPUT, OUTPUT, RANGE = 1024, 256, 0.5
IDLE_S = 6.0
SEED = 11
SAMPLE_S = 0.05


@dataclass(frozen=True)
class Contestant:
    """A running engine and what is known of its steps."""

    engine: LocalEngine
    log: StepLog
    times: Path

    async def load(self, work: Workload, arrivals: Arrivals) -> LoadReport:
        self.log.steps.clear()
        return await run_load(EngineTarget(self.engine), work, arrivals, seed=SEED)


class DeviceMemory:
    """GPU memory of each process, as the driver counts it."""

    def __init__(self) -> None:
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)

    def of(self, pid: int) -> int:
        """Bytes; 0 where the driver does not tell."""
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        return next((int(one.usedGpuMemory or 0) for one in processes if one.pid == pid), 0)

    @contextmanager
    def most(self, pid: int) -> Iterator[list[int]]:
        """The most that the process held at any sample: the list's only number, when the block has ended."""
        peak, done = [self.of(pid)], threading.Event()

        def sample() -> None:
            while not done.wait(SAMPLE_S):
                peak[0] = max(peak[0], self.of(pid))

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield peak
        finally:
            done.set()
            thread.join()


def shape(folder: Path) -> BenchModel:
    """The model's config.json in ``folder``, and its sizes."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": MAX_MODEL_LEN,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()  # an elastic engine asks which weights it has: none that it reads
    layer = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * INNER
    facts = ModelFacts(
        path=folder,
        dtype="bfloat16",
        max_model_len=MAX_MODEL_LEN,
        weights_bytes=2 * (LAYERS * layer + VOCABULARY * HIDDEN),
        kv_token_bytes=2 * LAYERS * 2 * KV_HEADS * HEAD_DIM,
        activation_token_bytes=2 * (3 * INNER + 8 * HIDDEN) + 8 * HIDDEN,
        logits_row_bytes=10 * VOCABULARY,
    )
    return BenchModel(facts, BLOCK_TOKENS)


def on_gpu(spec: EngineSpec, engine_args: Mapping[str, Any]) -> EngineSpec:
    """The variant with CUDA graphs, random weights and ``engine_args``."""
    kept = {name: value for name, value in spec.engine_args.items() if name != "enforce_eager"}
    more: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True}
    if not spec.elastic:
        more["worker_cls"] = "benchmarks.peak_worker.PeakWorker"
    return replace(spec, engine_args=kept | more | dict(engine_args))


@asynccontextmanager
async def contestant(name: str, spec: EngineSpec, folder: Path, limit_bytes: int) -> AsyncIterator[Contestant]:
    """Start an engine, give an elastic one the device's bytes, and warm it up."""
    log, times = StepLog(WallClock()), folder / f"{name}.times"
    async with local_engine(spec, folder / f"{name}.board", 1, Instruments([log], timed(times))) as engine:
        if engine.row is not None:
            engine.set_limit(limit_bytes)
        await warm_up(engine)
        print(f"{name} is up", flush=True)
        yield Contestant(engine, log, times)


async def measure_memory(model: BenchModel, engine: LocalEngine) -> Memory:
    """Activations by tokens of a step, from stock vLLM."""
    peaks = []
    for number, tokens in enumerate(PEAK_TOKENS):
        prompt = [int(t) for t in random_workload(1, input_len=tokens, output_len=1, seed=number).requests[0].prompt]
        await engine.llm.collective_rpc("begin_peak")
        await engine.generate(prompt, 1, f"peak-{tokens}")
        peaks.append((tokens, max(await engine.llm.collective_rpc("end_peak"))))
    return fit_memory(model.block_bytes, model.block_tokens, peaks)


async def long_inputs(field: Mapping[str, Contestant], memory: DeviceMemory) -> dict[str, Any]:
    """All requests there at the start. Figures by engine."""
    work = random_workload(JOB.requests, input_len=JOB.prompt, output_len=JOB.output, seed=SEED)
    found: dict[str, Any] = {}
    for name, one in field.items():
        with memory.most(one.engine.core_pid) as most:
            report = await one.load(work, OpenLoop())
        figures = decode_figures(one.log.steps)
        found[name] = asdict(figures) | {"report": report.to_json(), "device_peak_bytes": most[0]}
        print(
            f"{name}: held {figures.held:.2f}, decode {figures.tokens_per_s:.0f} tok/s ({figures.step_ms:.2f} ms a "
            f"step), all in {report.duration_s:.1f} s, {figures.preemptions} preemptions, "
            f"{most[0] / MIB:.0f} MiB of the GPU at most",
            flush=True,
        )
    return found


async def no_pressure(field: Mapping[str, Contestant]) -> tuple[dict[str, float], dict[str, Any]]:
    """Rounds in turns after one that warms up: headline and details."""
    rates: dict[str, list[float]] = {name: [] for name in field}
    steps_s: dict[str, list[float]] = {name: [] for name in field}
    before: dict[str, SchedulerTimes] = {}
    moves_before_ns = 0
    for number in range(ROUNDS + 1):
        if number == 1:
            before = {name: SchedulerTimes.read(one.times) for name, one in field.items()}
            moves_before_ns = field["elastic"].engine.moves_ns()
        work = random_workload(REQUESTS, input_len=INPUT, output_len=OUTPUT, range_ratio=RANGE, seed=100 + number)
        for name, one in field.items():
            report = await one.load(work, ClosedLoop(CLIENTS))
            if number:
                rates[name].append(report.output_throughput)
                steps_s[name] += [step.seconds for step in one.log.steps if step.seconds]
    scheduler_us = {name: SchedulerTimes.read(one.times).us_a_step_since(before[name]) for name, one in field.items()}
    moves_ns = field["elastic"].engine.moves_ns() - moves_before_ns
    mean_s = {name: statistics.mean(seconds) for name, seconds in steps_s.items()}
    ratio = "no_pressure_throughput_ratio"
    rounds = [advantage(ratio, {name: rate[at] for name, rate in rates.items()}) for at in range(ROUNDS)]
    headline = {name: statistics.median(one[name] for one in rounds) for name in (ratio, f"{ratio}_vs_best")}
    headline["scheduler_added_share"] = (scheduler_us["elastic"] - scheduler_us["A"]) / 1e6 / mean_s["elastic"]
    headline["moves_share"] = moves_ns / 1e9 / sum(steps_s["elastic"])
    details = {
        "tokens_per_s": rates,
        "scheduler_us_a_step": scheduler_us,
        "mean_step_ms": {name: 1000 * seconds for name, seconds in mean_s.items()},
    }
    print(f"no pressure, tokens/s: {rates}; scheduler, us a step: {scheduler_us}", flush=True)
    return headline, details


async def run(folder: Path, engine_args: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Headline and details of both scenarios. ``folder``: for boards, times and the model's config."""
    model, device = shape(folder), DeviceMemory()
    longest = model.longest_blocks
    async with AsyncExitStack() as stack:

        async def start(name: str, spec: EngineSpec, limit_bytes: int = 0) -> Contestant:
            return await stack.enter_async_context(contestant(name, on_gpu(spec, engine_args), folder, limit_bytes))

        field = {"A": await start("A", static_spec(model, MAX_NUM_SEQS, longest, MAX_MODEL_LEN))}
        memory = await measure_memory(model, field["A"].engine)
        device_bytes = memory.activation_bytes(MAX_MODEL_LEN) + longest * model.block_bytes
        # The elastic engine needs room for the smallest step alone, a token of each request.
        room = {"A": MAX_MODEL_LEN, "B": CHUNK, "elastic": MAX_NUM_SEQS}
        held = {
            name: min(memory.held(device_bytes, tokens, JOB.request_tokens), JOB.requests)
            for name, tokens in room.items()
        }
        print(
            f"device bytes {device_bytes / MIB:.0f} MiB beside the weights; activations {memory.step_bytes / MIB:.0f} "
            f"MiB + {memory.token_bytes / 1024:.1f} KiB a token; bound, requests held: {held}",
            flush=True,
        )
        field["B"] = await start("B", static_spec(model, MAX_NUM_SEQS, memory.blocks(device_bytes, CHUNK), CHUNK))
        field["elastic"] = await start(
            "elastic", elastic_spec(model, MAX_NUM_SEQS, device_bytes, MAX_MODEL_LEN), device_bytes
        )
        started = {name: device.of(one.engine.core_pid) for name, one in field.items()}
        long = await long_inputs(field, device)
        await asyncio.sleep(IDLE_S)
        idle = {name: device.of(one.engine.core_pid) for name, one in field.items()}
        print(f"GPU memory after {IDLE_S:.0f} s of idleness, MiB: { ({n: b // MIB for n, b in idle.items()}) }")
        headline, quiet = await no_pressure(field)
        words = {word.name: field["elastic"].engine.word(word) for word in EngineWord}
    figures = {
        "concurrency_ratio": {name: one["held"] for name, one in long.items()},
        "decode_throughput_ratio": {name: one["tokens_per_s"] for name, one in long.items()},
    }
    for name, by_engine in figures.items():
        headline |= advantage(name, by_engine)
    details = {
        "memory": asdict(memory),
        "device_bytes": device_bytes,
        "held_bound": held,
        "device_started_bytes": started,
        "device_idle_bytes": idle,
        "long": long,
        "no_pressure": quiet,
        "elastic_board": words,
        "engine_args": dict(engine_args),
    }
    return headline, details


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-args", type=json.loads, default={}, help="more of vLLM's, as JSON, for all engines")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, environment({"VLLM_RPC_BASE_PATH": folder}):
        headline, details = asyncio.run(run(Path(folder), args.engine_args))
    finish("gpu_engines", {name: round(value, 4) for name, value in headline.items()}, details)


if __name__ == "__main__":
    main()
