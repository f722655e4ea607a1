"""What a step is asked to do."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepDemand:
    """What the scheduler's queues ask for at the start of a step.

    Attributes:
        running, waiting: requests; blocks_wanted: KV blocks beyond those referenced now that they could use.
        blocks_first: of blocks_wanted, those of running requests and of the first waiting one, which vLLM admits only
            where its whole prompt fits.
        tokens_wanted, tokens_least: tokens that the step could compute, and those it must be able to: a decode of
            each of the most requests that can run; tokens_running: those of running requests.
        rows: most requests that the step can sample for.
        blocks_returning: referenced blocks that become free when steps in flight have finished.
        preemptions: since start.
    """

    running: int
    waiting: int
    blocks_wanted: int
    blocks_first: int
    tokens_wanted: int
    tokens_running: int
    tokens_least: int
    rows: int
    blocks_returning: int
    preemptions: int

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)


NOTHING = StepDemand(
    running=0,
    waiting=0,
    blocks_wanted=0,
    blocks_first=0,
    tokens_wanted=0,
    tokens_running=0,
    tokens_least=0,
    rows=0,
    blocks_returning=0,
    preemptions=0,
)
"""No request is there."""
