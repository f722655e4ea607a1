"""What a simulation found, JSON-ready: latencies, attainment, goodput, memory by owner over time."""

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cluster.bench.report import DEFAULT_PERCENTILES, Latencies
from cluster.move import MoveOutcome, Trigger
from cluster.prediction import PredictionError
from cluster.simulator.arrivals import Arrival
from cluster.simulator.memory_sample import MemorySample
from cluster.simulator.scenario import Scenario
from cluster.slo import Ending, Outcome, SloAccount
from replicas.decode_batch import EngineRequest


@dataclass(frozen=True, slots=True)
class RequestRow:
    """One request that has ended. Times in seconds, NaN where they never came."""

    number: int
    at_s: float
    slo_class: str
    ending: Ending
    kept: bool
    ttft_s: float
    tpot_s: float
    latency_s: float
    prompt_tokens: int
    output_tokens: int
    hit_tokens: int


@dataclass
class SimulationResult:
    """Attributes:
    duration_s: simulated, until the last request had ended.
    reports: rounds of them.
    moves: migrations by trigger and outcome.
    rows: requests in the order in which they ended.
    """

    scenario: Scenario
    account: SloAccount
    ttft_error: PredictionError
    tpot_error: PredictionError
    duration_s: float = 0.0
    preemptions: int = 0
    reports: int = 0
    moves: Counter[tuple[Trigger, MoveOutcome]] = field(default_factory=Counter)
    rows: list[RequestRow] = field(default_factory=list)
    samples: list[MemorySample] = field(default_factory=list)

    def add(self, number: int, arrival: Arrival, outcome: Outcome, engine: EngineRequest | None) -> None:
        """A request has ended."""
        self.account.add(outcome)
        self.rows.append(
            RequestRow(
                number=number,
                at_s=arrival.at_s,
                slo_class=outcome.slo_class,
                ending=outcome.ending,
                kept=outcome.kept,
                ttft_s=outcome.ttft_s,
                tpot_s=outcome.tpot_s,
                latency_s=outcome.latency_s,
                prompt_tokens=arrival.prompt_tokens,
                output_tokens=outcome.output_tokens,
                hit_tokens=engine.hit_tokens if engine is not None else 0,
            )
        )

    @property
    def answered(self) -> list[RequestRow]:
        return [row for row in self.rows if row.ending is Ending.ANSWERED]

    def latencies(self) -> dict[str, Latencies]:
        """TTFT, TPOT (of requests with a second token) and E2EL of answered requests."""
        answered = self.answered
        return {
            "ttft": Latencies.of((row.ttft_s for row in answered), DEFAULT_PERCENTILES),
            "tpot": Latencies.of((row.tpot_s for row in answered if row.output_tokens > 1), DEFAULT_PERCENTILES),
            "e2el": Latencies.of((row.latency_s for row in answered), DEFAULT_PERCENTILES),
        }

    @property
    def hit_share(self) -> float:
        """Prompt tokens found in prefix caches; NaN where nothing was answered."""
        answered = self.answered
        prompts = sum(row.prompt_tokens for row in answered)
        return sum(row.hit_tokens for row in answered) / prompts if prompts else math.nan

    def attainment_curve(self, bins: int = 60) -> tuple[list[float], list[float]]:
        """Middle of each interval of arrival, and the share of its requests that kept their targets; only intervals
        with requests."""
        at = np.array([row.at_s for row in self.rows])
        kept = np.array([row.kept for row in self.rows], dtype=float)
        width = max(float(at.max()) / bins, 1e-9)
        where = np.minimum((at / width).astype(int), bins - 1)
        counts = np.bincount(where, minlength=bins)
        shares = np.bincount(where, weights=kept, minlength=bins) / np.maximum(counts, 1)
        used = np.flatnonzero(counts)
        return [float((one + 0.5) * width) for one in used], [float(shares[one]) for one in used]

    def to_json(self, records: bool = False) -> dict[str, Any]:
        """JSON-ready; what was not measured is None. ``records`` adds every request."""
        answered = self.answered
        tree: dict[str, Any] = {
            "scenario": self.scenario.to_json(),
            "requests": len(self.rows),
            "duration_s": self.duration_s,
            "slo": self.account.to_json(self.duration_s),
            "output_tokens_per_s": sum(row.output_tokens for row in answered) / max(self.duration_s, 1e-9),
            "prefix_hit_share": _finite(self.hit_share),
            "preemptions": self.preemptions,
            "moves": {f"{trigger} {outcome}": count for (trigger, outcome), count in sorted(self.moves.items())},
            "prediction": {
                name: {"count": error.count, "median_error": _finite(error.median), "bias": _finite(error.bias)}
                for name, error in (("ttft", self.ttft_error), ("tpot", self.tpot_error))
            },
        }
        for name, latencies in self.latencies().items():
            tree[f"mean_{name}_ms"] = _finite(latencies.mean_ms)
            tree[f"median_{name}_ms"] = _finite(latencies.median_ms)
            for percentile, value_ms in latencies.percentiles_ms.items():
                tree[f"p{percentile:g}_{name}_ms"] = _finite(value_ms)
        tree["memory"] = [asdict(sample) for sample in self.samples]
        if records:
            tree["records"] = [_row_json(row) for row in sorted(self.rows, key=lambda row: row.number)]
        return tree


def _row_json(row: RequestRow) -> dict[str, Any]:
    return {key: _finite(value) if isinstance(value, float) else value for key, value in asdict(row).items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
