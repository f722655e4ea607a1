"""What a worker's steps take of its heap, measured in the worker. For engines that compute on the CPU."""

from memory_agent.heap import HeapProbe, keep_freed
from replicas.activation_ledger import ActivationSample

_LEFT_BYTES = 1 << 20
"""A step that leaves more than this on the heap has it trimmed, so that the next one finds nothing there to reuse: it
takes what it needs, and what is charged for it is what it takes."""


class ActivationMeter:
    """Measures from the start of one step to the start of the next, so that sampling is part of the step.

    Made before the first step, when weights are loaded: what the process holds then, or after a rest, is not counted.

    Args:
        charged: steps are charged for what they take: they give every large buffer back at once. Otherwise the heap
            keeps it for the next step, which is faster and takes a few times the memory, and nothing is measured.
    """

    def __init__(self, charged: bool) -> None:
        keep_freed(not charged)
        self._charged = charged
        self._probe = HeapProbe()
        self._tokens = self._rows = 0
        self._rest_floor = self._probe.floor_bytes
        self._first = True

    def start_step(self, tokens: int, rows: int) -> None:
        """The forward of a step with so many tokens of so many requests comes next."""
        self._tokens, self._rows = tokens, rows
        if tokens and self._charged:
            self._probe.restart()

    def finish_step(self) -> list[ActivationSample]:
        """What the step that was started last took; nothing where none has run but the very first, or none is
        charged."""
        tokens, self._tokens = self._tokens, 0
        if not tokens or not self._charged:
            return []
        if self._first:  # libraries allocate what they keep for good: it would count as the step's
            self._first = False
            self.rest()
            return []
        use = self._probe.read()
        held = use.held_bytes
        if held > _LEFT_BYTES:
            self._probe.trim()
            held = 0
        left = max(0, self._probe.floor_bytes - self._rest_floor)
        return [ActivationSample(tokens, self._rows, use.peak_bytes, left + held)]

    def rest(self) -> None:
        """Give back what past steps left; what cannot be given back is not counted as theirs any more."""
        self._probe.trim()
        self._rest_floor = self._probe.floor_bytes
