"""What a request's TTFT and TPOT would be on each replica. Pure: a fleet view and a step time in, seconds out.

    TTFT = rest of the step under way + steps that compute what waits and this prompt (decodes beside them) + wait for
    KV
    TPOT = a step with this request beside those that run, longer by the share of time that prompts take

A prediction is compared with what came, and ``PredictionError`` keeps how far off it is.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cluster.fleet_view import STALE_AFTER_S, FleetView, Floats
from replicas.step_time import StepTime

_MOST_BUSY = 0.9
"""Share of time that prompts are taken to leave decodes no more than the rest of."""


@dataclass
class Traffic:
    """What requests are like, on average over the recent ones; what is asked about those that are only counted.

    Attributes:
        prompt_tokens: to compute, without what is found in a prefix cache; output_tokens: likewise.
        prompt_rate: prompt tokens a second that a replica gets.
        routers: that send as much as this one.
    """

    prompt_tokens: float = 512.0
    output_tokens: float = 128.0
    prompt_rate: float = 0.0
    routers: int = 1
    _last_s: float = -math.inf

    _MEMORY = 0.99
    _RATE_MEMORY_S = 20.0

    def sent(self, tokens: int, replicas: int, now_s: float) -> None:
        """A prompt with ``tokens`` to compute went to one of ``replicas``."""
        self.prompt_tokens += (1 - self._MEMORY) * (tokens - self.prompt_tokens)
        self.prompt_rate *= math.exp(-max(0.0, now_s - self._last_s) / self._RATE_MEMORY_S)
        self.prompt_rate += tokens * self.routers / max(replicas, 1) / self._RATE_MEMORY_S
        self._last_s = now_s

    def answered(self, tokens: int) -> None:
        """An answer had so many tokens."""
        self.output_tokens += (1 - self._MEMORY) * (tokens - self.output_tokens)


@dataclass(frozen=True)
class Predicted:
    """Seconds by replica, of shape (replicas,); ``own_s``: of computing this prompt alone."""

    ttft_s: Floats
    tpot_s: Floats
    own_s: Floats


@dataclass(frozen=True)
class Predictor:
    """What all replicas of a model have in common.

    Attributes:
        step_time: of their steps; chunk: most tokens of one; active: requests that one runs at once, where it has not
            told another number.
        overhead_s: outside of steps, before the first token.
    """

    step_time: StepTime
    chunk: int
    active: int
    overhead_s: float = 0.0

    def predict(self, fleet: FleetView, prompt_tokens: int, hit_tokens: Floats, traffic: Traffic) -> Predicted:
        """For a request of ``prompt_tokens``, of which each replica has ``hit_tokens``, of shape (replicas,)."""
        step = self.step_time
        own = np.maximum(prompt_tokens - hit_tokens, 1.0)
        requests = fleet.requests
        waiting = np.minimum(np.maximum(fleet.waiting + np.minimum(fleet.changed, 0.0), 0.0), requests)
        queued = np.maximum(fleet.pending_tokens, waiting * traffic.prompt_tokens)
        active = np.where(fleet.active > 0, fleet.active, self.active)
        rows = np.clip(requests - queued / max(traffic.prompt_tokens, 1.0), 0.0, active)
        decode = step.step_s + rows * step.row_s + fleet.kv_used * step.kv_token_s
        own_s = own * step.token_s + own * (hit_tokens + own / 2) * step.pair_s
        queued_s = queued * (step.token_s + traffic.prompt_tokens / 2 * step.pair_s)
        steps = np.ceil((queued + own) / self.chunk)
        busy = min(_MOST_BUSY, traffic.prompt_rate * (step.token_s + traffic.prompt_tokens / 2 * step.pair_s))
        tpot = (decode + step.row_s + prompt_tokens * step.kv_token_s) / (1 - busy)
        # Whole requests leave, the next one on average after an equal part of what is left of all.
        lacking = np.maximum(fleet.kv_used + queued + prompt_tokens - fleet.kv_tokens, 0.0)
        lacking = np.where(fleet.kv_tokens > 0, lacking, 0.0)
        leaving = np.maximum(fleet.kv_used, 1.0) / np.maximum(traffic.output_tokens * tpot / 2, 1e-9)
        places = np.maximum(requests + 1 - active, 0.0)
        wait = np.maximum(lacking / leaving, places / active * traffic.output_tokens * tpot)
        under_way = np.where(rows > 0, decode / 2, 0.0)
        ttft = self.overhead_s + under_way + queued_s + own_s + steps * decode + wait
        return Predicted(ttft, tpot, own_s)


class EngineWords(Protocol):
    """What an engine tells of itself: ``cluster.cluster_view.EnginePressure`` is one."""

    @property
    def age_s(self) -> float: ...
    @property
    def step_time(self) -> StepTime | None: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_num_batched_tokens(self) -> int: ...


def common_predictor(engines: Iterable[EngineWords]) -> Predictor | None:
    """For a model whose engines these are: step times are the mean of those that have learned theirs and have reported
    lately. None where there is none."""
    learned = [(one, one.step_time) for one in engines if one.step_time is not None and one.age_s <= STALE_AFTER_S]
    if not learned:
        return None
    parts = np.mean([step_time.parts for _, step_time in learned], axis=0)
    return Predictor(
        StepTime(*(float(part) for part in parts)),
        chunk=max(1, *(one.max_num_batched_tokens for one, _ in learned)),
        active=max(1, *(one.max_num_seqs for one, _ in learned)),
    )


class PredictionError:
    """How far predictions are off: of what was predicted over what came, as logarithms, so that twice and half weigh
    alike.

    Attributes:
        count: of predictions. predicted_s, actual_s: sums of what was predicted, and of what came.
    """

    def __init__(self) -> None:
        self.count = 0
        self.predicted_s = self.actual_s = 0.0
        self._sum = 0.0
        self._absolute: list[float] = []

    def observe(self, predicted_s: float, actual_s: float) -> None:
        """A prediction and what came; those without a finite time above 0 are passed over."""
        if not (0 < predicted_s < math.inf and 0 < actual_s < math.inf):
            return
        error = math.log(predicted_s / actual_s)
        self.count += 1
        self.predicted_s += predicted_s
        self.actual_s += actual_s
        self._sum += error
        # A reservoir of every k-th keeps the median exact enough without keeping all.
        if self.count % max(1, self.count // 10_000) == 0:
            self._absolute.append(abs(error))

    def to_json(self) -> dict[str, float | int | None]:
        """JSON-ready; None before the first."""
        known = self.count > 0
        return {
            "count": self.count,
            "median_error": round(self.median, 4) if known else None,
            "bias": round(self.bias, 4) if known else None,
        }

    @property
    def bias(self) -> float:
        """Relative: 0.1 where predictions are 10 % too long on (geometric) average; NaN before the first."""
        return math.expm1(self._sum / self.count) if self.count else math.nan

    @property
    def median(self) -> float:
        """Relative error of a median prediction, whichever way; NaN before the first."""
        return math.expm1(float(np.median(self._absolute))) if self._absolute else math.nan
