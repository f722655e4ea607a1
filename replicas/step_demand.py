"""What a step is asked to do."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepDemand:
    """What the scheduler's queues ask for at the start of a step.

    Attributes:
        running, waiting: requests; blocks_wanted: KV blocks beyond those referenced now that they could use.
        tokens_wanted, tokens_least: tokens that the step could compute, and those it must be able to: a decode of
            each of the most requests that can run.
        rows: most requests that the step can sample for.
        blocks_returning: referenced blocks that become free when steps in flight have finished.
        preemptions: since start.
    """

    running: int
    waiting: int
    blocks_wanted: int
    tokens_wanted: int
    tokens_least: int
    rows: int
    blocks_returning: int
    preemptions: int

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)


NOTHING = StepDemand(
    running=0, waiting=0, blocks_wanted=0, tokens_wanted=0, tokens_least=0, rows=0, blocks_returning=0, preemptions=0
)
"""No request is there."""
