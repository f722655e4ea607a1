"""How a worker's connector learns what its steps take: on a CPU by ``ActivationMeter``, on a GPU by ``CudaMeter``."""

from typing import Protocol

from replicas.activation_ledger import ActivationSample


class StepMeter(Protocol):
    """Measures a worker's steps, from the start of one to the start of the next."""

    def finish_step(self, keep_bytes: int = 0) -> list[ActivationSample]:
        """What the step that was started last took, where that can be told. Of what steps free, so much may be kept
        from now on."""
        ...

    def make_room(self, tokens: int, rows: int, step_bytes: int) -> None:
        """A step of this size comes next, charged for ``step_bytes`` on this worker: give back, before KV memory moves,
        what would come on top of that."""
        ...

    def rest(self) -> None:
        """Give back what past steps left."""
        ...

    def start_step(self, tokens: int, rows: int) -> None:
        """The forward of a step with so many tokens of so many requests comes next."""
        ...
