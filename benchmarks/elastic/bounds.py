"""The most that memory and speed allow. Pure: measured bytes and rates in, ratios out.

Of a device's bytes (``replicas.step_memory``) the elastic engine's bound is what fits beside its smallest step, a
static engine's what fits beside its largest.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from replicas.step_memory import Memory
from replicas.step_time import nonnegative_solve

STATIC = ("A", "B", "C")
"""The baselines. Every other variant is ours."""


def fit_memory(block_bytes: int, block_tokens: int, peaks: Sequence[tuple[int, int]]) -> Memory:
    """The line through ``peaks``, (tokens of a step, bytes at its peak), which are at least two sizes."""
    tokens, peak_bytes = (np.array(column, dtype=float) for column in zip(*peaks, strict=True))
    slope, constant = np.polyfit(tokens, peak_bytes, 1)
    return Memory(block_bytes, block_tokens, float(slope), max(0.0, float(constant)))


@dataclass(frozen=True)
class Speed:
    """How long steps take.

    Attributes:
        prefill_s: seconds of one prompt of the scenario's length, by the most tokens of a step.
        step_s, row_s, context_s: a decode step takes step_s, and for each request row_s and context_s a token before.
    """

    prefill_s: Mapping[int, float]
    step_s: float
    row_s: float
    context_s: float

    @property
    def fastest_step(self) -> int:
        """Tokens of a step with which a prompt is computed first."""
        return min(self.prefill_s, key=self.prefill_s.__getitem__)

    def decode_step_s(self, batch: int, context: float) -> float:
        """Seconds of a step that decodes ``batch`` requests, each with ``context`` tokens so far."""
        return self.step_s + batch * (self.row_s + context * self.context_s)

    def decode_rate(self, batch: int, context: float) -> float:
        """Output tokens a second of such steps; 0 for an empty batch."""
        return batch / self.decode_step_s(batch, context) if batch else 0.0


def fit_decode(prefill_s: Mapping[int, float], points: Sequence[tuple[int, float, float]]) -> Speed:
    """Least squares over ``points``, (batch, context, seconds of a step); no part is negative."""
    rows = np.array([[1.0, batch, batch * context] for batch, context, _ in points])
    seconds = np.array([point[2] for point in points])
    return Speed(prefill_s, *(float(part) for part in nonnegative_solve(rows.T @ rows, rows.T @ seconds)))


@dataclass(frozen=True)
class Job:
    """``requests`` prompts of ``prompt`` tokens, all there at the start, with ``output`` tokens each."""

    requests: int
    prompt: int
    output: int

    @property
    def request_tokens(self) -> int:
        return self.prompt + self.output

    @property
    def context(self) -> float:
        """Tokens before a decoded one, on average."""
        return self.prompt + self.output / 2


def makespan_s(job: Job, held: int, step_tokens: int, speed: Speed) -> float:
    """Estimated seconds of the whole job in waves of ``held`` requests; infinite where none is held."""
    if held < 1:
        return float("inf")
    full, rest = divmod(job.requests, held)
    waves = [held] * full + [rest] * (rest > 0)
    decode = sum(job.output * speed.decode_step_s(wave, job.context) for wave in waves)
    return job.requests * speed.prefill_s[step_tokens] + decode


def best_chunk(job: Job, device_bytes: int, memory: Memory, speed: Speed, least: int) -> int:
    """The step size, of those whose prefill was measured, with which a static engine ends ``job`` first: larger steps
    are faster and leave less KV memory. It must leave ``least`` KV blocks. Raises ValueError where none does."""
    fitting = [c for c in speed.prefill_s if memory.blocks(device_bytes, c) >= least]
    if not fitting:
        raise ValueError(f"{device_bytes} bytes leave {least} KV blocks beside no step of {sorted(speed.prefill_s)}")
    return min(fitting, key=lambda c: (makespan_s(job, memory.held(device_bytes, c, job.request_tokens), c, speed), c))


def advantage(
    name: str, figures: Mapping[str, float], ours: str = "elastic", lower_is_better: bool = False
) -> dict[str, float]:
    """How many times better the figure of ``ours`` is than A's, as ``name``, and than the best static one, as
    ``name``_vs_best. Empty where a variant has no figure above 0: there is no ratio then."""
    if not all(value > 0 and math.isfinite(value) for value in figures.values()):
        return {}
    mine, static = figures[ours], [value for variant, value in figures.items() if variant in STATIC]
    if lower_is_better:
        return {name: figures["A"] / mine, f"{name}_vs_best": min(static) / mine}
    return {name: mine / figures["A"], f"{name}_vs_best": mine / max(static)}
