"""What each step of an engine did, told by vLLM's own statistics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from cluster.bench.clock import Clock


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        seconds: since the step before; None where the engine was idle between them.
        running, waiting: requests after the step.
        tokens: produced; firsts: those that are their request's first; preempted: requests.
        decoding: every request of the step produced a token and none computed a prompt.
    """

    at_s: float
    seconds: float | None
    running: int
    waiting: int
    tokens: int
    firsts: int
    preempted: int
    decoding: bool


class StepLog(StatLoggerBase):
    """Collects steps. Is its own factory: it is made before the engine."""

    def __init__(self, clock: Clock) -> None:
        self.steps: list[Step] = []
        self._clock = clock

    def __call__(self, config: VllmConfig, engine_index: int) -> StatLoggerBase:
        return self

    def record(
        self, scheduler_stats: SchedulerStats | None, iteration_stats: IterationStats | None, *_: Any, **__: Any
    ) -> None:
        if scheduler_stats is None:
            return
        now_s, last = self._clock.now(), self.steps[-1] if self.steps else None
        running, waiting = scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs
        iteration = iteration_stats or IterationStats()  # type: ignore[no-untyped-call]
        tokens, firsts = iteration.num_generation_tokens, len(iteration.time_to_first_tokens_iter)
        self.steps.append(
            Step(
                at_s=now_s,
                seconds=now_s - last.at_s if last and last.running + last.waiting else None,
                running=running,
                waiting=waiting,
                tokens=tokens,
                firsts=firsts,
                preempted=iteration.num_preempted_reqs,
                decoding=0 < tokens == running + len(iteration.finished_requests) and not firsts,
            )
        )

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


@dataclass(frozen=True)
class DecodeFigures:
    """Steps that only decoded, while requests waited for a place; where none ever waited, all that only decoded.

    Attributes:
        held: requests in such a step, on average over their time: what fits at once.
        tokens_per_s: their output tokens over their seconds; step_ms: their mean.
        preemptions: of all steps.
    """

    held: float
    tokens_per_s: float
    step_ms: float
    preemptions: int


def decode_figures(steps: Sequence[Step]) -> DecodeFigures:
    """Figures of a job whose requests were all there at the start. NaN where no step only decoded."""
    decoding = [(step, step.seconds) for step in steps if step.decoding and step.seconds]
    counted = [(step, seconds) for step, seconds in decoding if step.waiting] or decoding
    seconds, preemptions = sum(s for _, s in counted), sum(step.preempted for step in steps)
    if not counted:
        return DecodeFigures(math.nan, math.nan, math.nan, preemptions)
    return DecodeFigures(
        held=sum(step.tokens * s for step, s in counted) / seconds,
        tokens_per_s=sum(step.tokens for step, _ in counted) / seconds,
        step_ms=1000 * seconds / len(counted),
        preemptions=preemptions,
    )
