"""The requests of a simulation: from a trace, or made up. Everything follows from the seed.

Prefix blocks are what the engine model shares: whole runs of ``block_tokens`` tokens, a multiple of an engine's KV
block.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.bench.errors import BenchError
from cluster.bench.traces import BLOCK_TOKENS, TraceRow
from cluster.bench.workload import random_stream

_BURSTS, _LENGTHS, _PREFIXES, _LABELS = 11, 12, 13, 14
"""Independent random streams of one seed."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request.

    Attributes:
        at_s: from the start, ascending.
        prefix: ids of the whole prefix blocks of its prompt.
        slo_class: its name; empty for the first one. tenant: whose request it is.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...] = ()
    slo_class: str = ""
    tenant: str = ""


@dataclass(frozen=True)
class Synthetic:
    """A made-up trace in the shape of production ones: bursts, lognormal lengths, shared beginnings.

    Attributes:
        rate: requests a second on average; burstiness: shape of the gamma intervals, 1 is Poisson, less is burstier.
        burst_factor, burst_s, calm_s: the rate is that many times higher in bursts of so many seconds on average, calm
            between them; 1: no bursts.
        prompt_tokens, output_tokens: medians; spread: standard deviation of their logarithms.
        prefixes: different beginnings; prefix_tokens: of each; prefix_share: of the requests that have one, on top.
    """

    requests: int
    rate: float
    burstiness: float = 1.0
    burst_factor: float = 1.0
    burst_s: float = 10.0
    calm_s: float = 50.0
    prompt_tokens: int = 1024
    output_tokens: int = 200
    spread: float = 0.8
    prefixes: int = 100
    prefix_tokens: int = 0
    prefix_share: float = 0.5

    def __post_init__(self) -> None:
        for name, value, fits in (
            ("--num-requests", self.requests, self.requests >= 1),
            ("--request-rate", self.rate, 0 < self.rate < math.inf),
            ("--burstiness", self.burstiness, 0 < self.burstiness < math.inf),
            ("--burst-factor", self.burst_factor, 1 <= self.burst_factor < math.inf),
            ("--input-len", self.prompt_tokens, self.prompt_tokens >= 1),
            ("--output-len", self.output_tokens, self.output_tokens >= 1),
            ("--spread", self.spread, 0 <= self.spread <= 3),
            ("--num-prefixes", self.prefixes, self.prefixes >= 1),
            ("--prefix-len", self.prefix_tokens, self.prefix_tokens >= 0),
            ("--prefix-share", self.prefix_share, 0 <= self.prefix_share <= 1),
        ):
            if not fits:
                raise BenchError(f"{name} {value:g} does not fit: see `ellm simulate --help` for what does")


def synthetic_arrivals(
    shape: Synthetic, seed: int, max_model_len: int, block_tokens: int = BLOCK_TOKENS
) -> list[Arrival]:
    """Requests of that shape, none longer than ``max_model_len``. Raises BenchError."""
    lengths, prefixes = random_stream(seed, _LENGTHS), random_stream(seed, _PREFIXES)
    count = shape.requests
    times = _times(shape, seed)
    prompts = np.rint(np.exp(lengths.normal(math.log(shape.prompt_tokens), shape.spread, count)))
    outputs = np.rint(np.exp(lengths.normal(math.log(shape.output_tokens), shape.spread, count)))
    # A few beginnings are asked for most: the weights of Zipf's law.
    weights = 1 / np.arange(1, shape.prefixes + 1)
    chosen = prefixes.choice(shape.prefixes, size=count, p=weights / weights.sum())
    chosen[prefixes.random(count) >= (shape.prefix_share if shape.prefix_tokens else 0.0)] = -1
    blocks = shape.prefix_tokens // block_tokens

    def arrival(at: int) -> Arrival:
        shared = int(chosen[at])
        prompt = max(1, int(prompts[at])) + (shape.prefix_tokens if shared >= 0 else 0)
        output = min(max(1, int(outputs[at])), max(1, max_model_len // 2))
        prefix = tuple(range(shared * blocks, (shared + 1) * blocks)) if shared >= 0 else ()
        return _fitting(Arrival(float(times[at]), prompt, output, prefix), max_model_len, block_tokens)

    return [arrival(at) for at in range(count)]


def trace_arrivals(
    rows: Sequence[TraceRow], max_model_len: int, time_scale: float = 1.0, rate: float | None = None
) -> list[Arrival]:
    """The rows of a trace, ``time_scale`` times as fast, or at ``rate`` requests a second on average. What is too long
    for the
    engine is cut. Raises BenchError."""
    if not 0 < time_scale < math.inf:
        raise BenchError(f"--time-scale {time_scale:g} does not fit: give a number above 0; 2 is twice as fast")
    if rate is not None:
        if not 0 < rate < math.inf:
            raise BenchError(f"--request-rate {rate:g} does not fit: give requests a second above 0")
        time_scale = rate * (rows[-1].arrival_s - rows[0].arrival_s) / max(1, len(rows) - 1) or 1.0
    return [
        _fitting(
            Arrival(row.arrival_s / time_scale, row.input_len, row.output_len, _whole(row)), max_model_len, BLOCK_TOKENS
        )
        for row in rows
    ]


def labelled(arrivals: Sequence[Arrival], classes: dict[str, float], tenants: int, seed: int) -> list[Arrival]:
    """Give each request a class, by these shares, and one of ``tenants``, by chance."""
    rng = random_stream(seed, _LABELS)
    names = list(classes)
    shares = np.array([classes[name] for name in names])
    if not (shares >= 0).all() or not shares.sum() > 0:
        raise BenchError(f"shares of classes should be 0 or more, and one above 0; found {classes}")
    kinds = rng.choice(len(names), size=len(arrivals), p=shares / shares.sum())
    owners = rng.integers(max(1, tenants), size=len(arrivals))
    return [replace(one, slo_class=names[kinds[at]], tenant=f"tenant-{owners[at]}") for at, one in enumerate(arrivals)]


def _times(shape: Synthetic, seed: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Gamma intervals, in time that runs faster during bursts."""
    rng = random_stream(seed, _BURSTS)
    ends: np.ndarray[tuple[int], np.dtype[np.float64]] = np.cumsum(rng.gamma(shape.burstiness, size=shape.requests))
    if ends[-1] <= 0:
        raise BenchError(f"--burstiness {shape.burstiness:g} is too small: give a larger one")
    ends *= shape.requests / shape.rate / ends[-1]
    if shape.burst_factor == 1:
        return ends
    mean = (shape.burst_factor * shape.burst_s + shape.calm_s) / (shape.burst_s + shape.calm_s)
    calm, work, real = True, [0.0], [0.0]
    while work[-1] < ends[-1]:
        lasts_s = rng.exponential(shape.calm_s if calm else shape.burst_s)
        work.append(work[-1] + lasts_s * (1.0 if calm else shape.burst_factor) / mean)
        real.append(real[-1] + lasts_s)
        calm = not calm
    bursty: np.ndarray[tuple[int], np.dtype[np.float64]] = np.interp(ends, work, real)
    # Bursts come as they come, so the mean rate would follow the seed: the whole is stretched to what was asked for.
    bursty *= shape.requests / shape.rate / bursty[-1]
    return bursty


def _whole(row: TraceRow) -> tuple[int, ...]:
    return (row.hash_ids or ())[: row.input_len // BLOCK_TOKENS]


def _fitting(arrival: Arrival, max_model_len: int, block_tokens: int) -> Arrival:
    output = min(arrival.output_tokens, max_model_len - 1)
    prompt = min(arrival.prompt_tokens, max_model_len - output)
    if (prompt, output) == (arrival.prompt_tokens, arrival.output_tokens):
        return arrival
    return replace(arrival, prompt_tokens=prompt, output_tokens=output, prefix=arrival.prefix[: prompt // block_tokens])
