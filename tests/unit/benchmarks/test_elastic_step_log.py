"""What the elastic benchmark reads from steps."""

import math

from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from benchmarks.elastic.step_log import StepLog, decode_figures


class Clock:
    """Says the time it was given."""

    def __init__(self) -> None:
        self.at_s = 0.0

    def now(self) -> float:
        return self.at_s

    async def sleep_until(self, at_s: float) -> None:
        raise NotImplementedError


def step(log: StepLog, clock: Clock, at_s: float, running: int, waiting: int, tokens: int, firsts: int = 0) -> None:
    clock.at_s = at_s
    iteration = IterationStats()
    iteration.num_generation_tokens = tokens
    iteration.time_to_first_tokens_iter = [0.0] * firsts
    log.record(SchedulerStats(num_running_reqs=running, num_waiting_reqs=waiting), iteration)


def test_only_steps_that_decode_everything_count() -> None:
    """Prefills, first tokens, steps in which a running request got nothing, and those in which nobody waited are left
    out."""
    clock = Clock()
    log = StepLog(clock)
    step(log, clock, 1.0, running=2, waiting=3, tokens=2, firsts=2)
    step(log, clock, 2.0, running=2, waiting=3, tokens=2)
    step(log, clock, 5.0, running=2, waiting=2, tokens=1)
    step(log, clock, 6.0, running=4, waiting=1, tokens=4)
    step(log, clock, 7.0, running=1, waiting=0, tokens=1)
    figures = decode_figures(log.steps)
    assert (figures.held, figures.tokens_per_s, figures.step_ms) == (3.0, 3.0, 1000.0)


def test_where_nobody_waits_every_decode_counts() -> None:
    """A variant with room for the whole job has figures too."""
    clock = Clock()
    log = StepLog(clock)
    step(log, clock, 1.0, running=2, waiting=0, tokens=2, firsts=2)
    step(log, clock, 2.0, running=2, waiting=0, tokens=2)
    assert decode_figures(log.steps).held == 2.0


def test_a_step_after_idleness_has_no_duration() -> None:
    """Nobody ran before it, so nobody knows when it began."""
    clock = Clock()
    log = StepLog(clock)
    step(log, clock, 1.0, running=0, waiting=0, tokens=1)
    step(log, clock, 9.0, running=1, waiting=0, tokens=1)
    assert math.isnan(decode_figures(log.steps).tokens_per_s)
