"""Measures what the bounds are computed from, before the scenario runs on the same machine."""

from collections.abc import Sequence

from benchmarks.elastic.bounds import Job, Speed, fit_decode, fit_memory
from benchmarks.elastic.process_memory import WorkerPeak
from benchmarks.elastic.race import SHARING, Racer
from benchmarks.elastic.variants import BenchModel, static_spec
from cluster.bench.workload import random_workload
from replicas.environment import environment
from replicas.local_engine import local_engine
from replicas.step_memory import Memory

_PEAK_TOKENS = (256, 1024)
_SHORT_TOKENS = 128
_DECODE_STEPS, _PASSES = 12, 2
_EXACT_HEAP = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
"""glibc then gives large buffers back at once, so that the peak is what the work needs and not what the heap keeps."""


async def measure_memory(model: BenchModel) -> Memory:
    """Activations of a step of plain vLLM, from its worker's peak resident memory."""
    longest = model.facts.max_model_len
    spec = static_spec(model, 2, 2 * model.longest_blocks, longest)
    sizes = [min(tokens, longest - 1) for tokens in _PEAK_TOKENS]
    peaks = []
    with environment(_EXACT_HEAP):
        async with local_engine(spec, None, SHARING) as engine:
            await engine.generate(_prompts(1, _SHORT_TOKENS, seed=1)[0], 2, "warm-up")
            for number, tokens in enumerate(sizes):
                peak = WorkerPeak(engine)
                await engine.generate(_prompts(1, tokens, seed=2 + number)[0], 1, f"peak-{tokens}")
                peaks.append((tokens, peak.read() - peak.before_bytes))
    return fit_memory(model.block_bytes, model.block_tokens, peaks)


async def measure_speed(racer: Racer, job: Job, steps: Sequence[int], batches: Sequence[int]) -> Speed:
    """Seconds of a prompt by step size, and of decode steps by batch and context.

    ``racer`` is an elastic engine, whose step size the lease board bounds; its lease should have room for everything.
    """
    prompts = _prompts(max(*batches, len(steps) + 1), job.prompt, seed=3)
    short = [prompt[:_SHORT_TOKENS] for prompt in prompts]
    with racer.alone():
        await _prefill_s(racer, prompts[0], steps[0])
        prefill = {
            step: await _prefill_s(racer, prompt, step) for step, prompt in zip(steps, prompts[1:], strict=False)
        }
        points = [
            await _decode_point(racer, some[:batch])
            for _ in range(_PASSES)
            for batch in batches
            for some in (prompts, short)
        ]
    racer.log.steps.clear()
    return fit_decode(prefill, points)


async def _prefill_s(racer: Racer, prompt: list[int], step: int) -> float:
    """Seconds of ``prompt`` with at most ``step`` tokens a step; it must not be cached."""
    racer.bound_steps(step)
    started_s = racer.player.clock.now()
    await racer.engine.generate(prompt, 1, f"prefill-{step}")
    return racer.player.clock.now() - started_s


async def _decode_point(racer: Racer, prompts: list[list[int]]) -> tuple[int, float, float]:
    """(batch, context, seconds of a step) of ``prompts`` decoded together: the quickest, because the slower ones
    are other users of the machine, whom the race has in everybody's turns."""
    log = racer.log
    await racer.engine.generate_all(prompts, 1, f"fill-{len(log.steps)}")
    before = len(log.steps)
    await racer.engine.generate_all(prompts, _DECODE_STEPS, f"decode-{before}")
    seconds = [s.seconds for s in log.steps[before:] if s.decoding and s.seconds and s.tokens == len(prompts)]
    return len(prompts), len(prompts[0]) + _DECODE_STEPS / 2, min(seconds)


def _prompts(count: int, tokens: int, seed: int) -> list[list[int]]:
    work = random_workload(count, input_len=tokens, output_len=1, seed=seed)
    return [[int(token) for token in request.prompt] for request in work.requests]
