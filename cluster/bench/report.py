"""What a run measured, in the names and definitions of ``vllm bench serve``.

    sent          first token                             last token
      |--- TTFT ---|--- ITL ---|--- ITL ---|--- ... --- ITL ---|
      |----------------------- E2EL ---------------------------|       TPOT = (E2EL - TTFT) / (output tokens - 1)

ITL is the gap between chunks. Where a server puts several tokens into one chunk, ITL counts the chunk once, as a reader
sees it; TPOT counts tokens. Throughput is over the whole run, from the start to the last answer. A failed request adds
nothing to latencies and throughput, and is a miss in attainment.
"""

import collections
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from cluster.bench.errors import BenchError

DEFAULT_PERCENTILES = (90.0, 95.0, 99.0)
_LATE_MS = 20.0
_LATE_SHARE = 0.02


@dataclass
class RequestRecord:
    """One request. Times are in seconds; ``sent_s`` and ``due_s`` from the start of the run.

    Attributes:
        due_s: when it should have been sent; None in a closed loop.
        input_tokens: by the target's count, else as asked.
        output_tokens: by the target's count, else by the chunks'; 0 where the request failed.
        exact_tokens: False where the target did not tell: each chunk is then counted as one token.
        itls_s: gap before each chunk but the first.
        error: why there is no complete answer; None where there is one.
    """

    index: int
    due_s: float | None
    sent_s: float
    input_tokens: int
    asked_tokens: int
    clipped: bool
    output_tokens: int = 0
    exact_tokens: bool = True
    ttft_s: float = math.nan
    latency_s: float = math.nan
    itls_s: "array[float]" = field(default_factory=lambda: array("d"))
    error: str | None = None

    @property
    def tpot_s(self) -> float:
        """0 where there is no second token, which is what goodput takes it for."""
        return (self.latency_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


@dataclass(frozen=True)
class Slo:
    """What a good request keeps, in milliseconds; None: not asked for."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """From ``ttft:500 tpot:50 e2el:2000``. Raises BenchError."""
        bounds: dict[str, float] = {}
        for pair in text.replace(",", " ").split():
            name, _, value = pair.partition(":")
            try:
                bound = float(value)
            except ValueError:
                bound = math.nan
            if name not in ("ttft", "tpot", "e2el") or name in bounds or not bound > 0:
                raise BenchError(
                    f"--goodput {pair!r} does not fit: give each of ttft, tpot and e2el at most once, in milliseconds, "
                    "such as 'ttft:500 tpot:50'"
                )
            bounds[name] = bound
        if not bounds:
            raise BenchError("--goodput names no bound: give some, such as 'ttft:500 tpot:50'")
        return cls(**{f"{name}_ms": bound for name, bound in bounds.items()})

    def kept_by(self, record: RequestRecord) -> bool:
        """False for a failed request."""
        return record.error is None and self.met_by(record.ttft_s, record.tpot_s, record.latency_s)

    def met_by(self, ttft_s: float, tpot_s: float, latency_s: float) -> bool:
        """Of an answered request; a time that is NaN meets no bound."""
        pairs = ((ttft_s, self.ttft_ms), (tpot_s, self.tpot_ms), (latency_s, self.e2el_ms))
        return all(bound_ms is None or value_s * 1000 <= bound_ms for value_s, bound_ms in pairs)


@dataclass(frozen=True)
class Latencies:
    """A distribution in milliseconds. Everything is NaN where nothing was measured."""

    mean_ms: float
    median_ms: float
    std_ms: float
    percentiles_ms: dict[float, float]

    @classmethod
    def of(cls, values_s: Iterable[float], percentiles: Sequence[float]) -> "Latencies":
        values_ms = np.fromiter(values_s, dtype=float) * 1000
        if not len(values_ms):
            return cls(math.nan, math.nan, math.nan, dict.fromkeys(percentiles, math.nan))
        ranks = np.percentile(values_ms, percentiles) if percentiles else ()
        return cls(
            float(values_ms.mean()),
            float(np.median(values_ms)),
            float(values_ms.std()),
            {percentile: float(value) for percentile, value in zip(percentiles, ranks, strict=True)},
        )


@dataclass(frozen=True)
class LoadReport:
    """Everything about one run.

    Attributes:
        settings: JSON-ready: workload, arrivals, seed, warm-up.
        duration_s: from the start until the last request had ended.
        max_concurrent_requests: most requests in flight at one moment.
        records: one a request, by index.
        slo: None where no goodput was asked for.
        percentiles: those of every distribution, 0 to 100.
    """

    settings: dict[str, Any]
    duration_s: float
    max_concurrent_requests: int
    records: Sequence[RequestRecord]
    slo: Slo | None = None
    percentiles: tuple[float, ...] = DEFAULT_PERCENTILES

    @cached_property
    def answered(self) -> list[RequestRecord]:
        return [record for record in self.records if record.error is None]

    @property
    def failed(self) -> int:
        return len(self.records) - len(self.answered)

    @property
    def total_input_tokens(self) -> int:
        return sum(record.input_tokens for record in self.answered)

    @property
    def total_output_tokens(self) -> int:
        return sum(record.output_tokens for record in self.answered)

    @property
    def request_throughput(self) -> float:
        """Answered requests a second."""
        return len(self.answered) / self.duration_s

    @property
    def output_throughput(self) -> float:
        """Output tokens a second."""
        return self.total_output_tokens / self.duration_s

    @property
    def total_token_throughput(self) -> float:
        """Input and output tokens a second."""
        return (self.total_input_tokens + self.total_output_tokens) / self.duration_s

    @property
    def request_goodput(self) -> float | None:
        """Requests a second that kept every bound of the SLO."""
        return None if self.slo is None else self._good(self.slo) / self.duration_s

    @property
    def attainment(self) -> float | None:
        """Share of all requests, failed ones too, that kept every bound of the SLO."""
        return None if self.slo is None else self._good(self.slo) / len(self.records)

    @cached_property
    def ttft(self) -> Latencies:
        return Latencies.of((record.ttft_s for record in self.answered), self.percentiles)

    @cached_property
    def tpot(self) -> Latencies:
        """Of requests with at least two tokens."""
        return Latencies.of((one.tpot_s for one in self.answered if one.output_tokens > 1), self.percentiles)

    @cached_property
    def itl(self) -> Latencies:
        return Latencies.of((gap_s for record in self.answered for gap_s in record.itls_s), self.percentiles)

    @cached_property
    def e2el(self) -> Latencies:
        return Latencies.of((record.latency_s for record in self.answered), self.percentiles)

    @cached_property
    def schedule_lag(self) -> Latencies | None:
        """How long after they were due requests were sent; None in a closed loop. Median, 99th percentile, maximum."""
        lags_s = [record.sent_s - record.due_s for record in self.records if record.due_s is not None]
        return Latencies.of(lags_s, (99.0, 100.0)) if lags_s else None

    @property
    def generator_late(self) -> bool:
        """Requests were sent so late (by the 99th percentile) that the load was not the one asked for: by more than
        20 ms, and by more than 2 % of the median end-to-end latency."""
        if self.schedule_lag is None:
            return False
        bound_ms = _LATE_MS
        if self.answered:
            bound_ms = max(bound_ms, _LATE_SHARE * self.e2el.median_ms)
        return self.schedule_lag.percentiles_ms[99.0] > bound_ms

    @property
    def tokens_per_chunk(self) -> float:
        """Output tokens over chunks, of answered requests; NaN where there are none."""
        chunks = sum(len(record.itls_s) + 1 for record in self.answered)
        return self.total_output_tokens / chunks if chunks else math.nan

    @property
    def errors(self) -> dict[str, int]:
        """How often each reason of failure was met, the most frequent first."""
        return dict(collections.Counter(one.error for one in self.records if one.error is not None).most_common())

    @property
    def warnings(self) -> list[str]:
        """What a reader of the figures has to know. Empty where everything went as asked."""
        lag = self.schedule_lag
        short = sum(record.output_tokens < record.asked_tokens for record in self.answered)
        guessed = sum(not record.exact_tokens for record in self.answered)
        clipped = [record.index for record in self.records if record.clipped]
        found: list[str] = []
        if self.generator_late and lag is not None:
            found.append(
                "THE LOAD GENERATOR WAS THE BOTTLENECK: one request in a hundred was sent "
                f"{lag.percentiles_ms[99.0]:.0f} ms late or more, so these figures are not the server's. Send less, or "
                "run it on another machine"
            )
        if short:
            found.append(f"{short} of {len(self.answered)} answers were shorter than asked for")
        if guessed:
            found.append(f"{guessed} answers came without a token count: each of their chunks counts as one token")
        if self.tokens_per_chunk > 1.02:
            found.append(
                f"a chunk carried {self.tokens_per_chunk:.2f} tokens on average: ITL is the gap between chunks, TPOT "
                "is per token"
            )
        if clipped:
            some = ", ".join(map(str, clipped[:8])) + (", ..." if len(clipped) > 8 else "")
            found.append(f"{len(clipped)} of {len(self.records)} requests are shorter than in the trace: {some}")
        if failed := self.settings.get("warmup_failed"):
            found.append(f"{failed} of the warm-up's requests failed")
        return found

    def to_json(self, records: bool = False) -> dict[str, Any]:
        """JSON-ready. Where ``vllm bench serve --save-result`` has the figure, the key is the same. What was not
        measured is None. ``records`` adds every request."""
        lag = self.schedule_lag
        tree: dict[str, Any] = {
            "settings": self.settings,
            "duration": self.duration_s,
            "completed": len(self.answered),
            "failed": self.failed,
            "errors": self.errors,
            "total_input_tokens": self.total_input_tokens,
            "total_output_tokens": self.total_output_tokens,
            "request_throughput": self.request_throughput,
            "request_goodput": self.request_goodput,
            "output_throughput": self.output_throughput,
            "total_token_throughput": self.total_token_throughput,
            "slo": None if self.slo is None else asdict(self.slo),
            "attainment": self.attainment,
            "max_concurrent_requests": self.max_concurrent_requests,
            "tokens_per_chunk": _finite(self.tokens_per_chunk),
            "median_schedule_lag_ms": None if lag is None else lag.median_ms,
            "p99_schedule_lag_ms": None if lag is None else lag.percentiles_ms[99.0],
            "max_schedule_lag_ms": None if lag is None else lag.percentiles_ms[100.0],
            "generator_late": self.generator_late,
            "clipped_requests": [record.index for record in self.records if record.clipped],
            "warnings": self.warnings,
        }
        for name in ("ttft", "tpot", "itl", "e2el"):
            latencies: Latencies = getattr(self, name)
            tree[f"mean_{name}_ms"] = _finite(latencies.mean_ms)
            tree[f"median_{name}_ms"] = _finite(latencies.median_ms)
            tree[f"std_{name}_ms"] = _finite(latencies.std_ms)
            for percentile, value_ms in latencies.percentiles_ms.items():
                tree[f"p{percentile:g}_{name}_ms"] = _finite(value_ms)
        if records:
            tree["records"] = [_record_json(record) for record in self.records]
        return tree

    def _good(self, slo: Slo) -> int:
        return sum(slo.kept_by(record) for record in self.records)


def parse_percentiles(text: str) -> tuple[float, ...]:
    """From ``50,99,99.9``, ascending. Raises BenchError."""
    try:
        values = sorted({float(part) for part in text.split(",")})
    except ValueError:
        values = [math.nan]
    if not all(0 <= value <= 100 for value in values):
        raise BenchError(f"--percentiles {text!r} does not fit: give numbers from 0 to 100, such as 50,90,99")
    return tuple(values)


def _record_json(record: RequestRecord) -> dict[str, Any]:
    tree = vars(record) | {"itls_s": list(record.itls_s)}
    return {key: _finite(value) if isinstance(value, float) else value for key, value in tree.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
