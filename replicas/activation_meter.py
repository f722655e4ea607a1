"""What a worker's steps take of its heap, measured in the worker. For engines that compute on the CPU."""

from memory_agent.heap import HeapProbe, keep_freed
from replicas.activation_ledger import ActivationSample

_LEFT_BYTES = 1 << 20
"""A step that may keep nothing and leaves more than this on the heap has it trimmed, so that the next one finds nothing
there to reuse: it takes what it needs, and what is charged for it is what it takes."""


class ActivationMeter:
    """Measures from the start of one step to the start of the next, so that sampling is part of the step.

    Made before the first step, when weights are loaded: what the process holds then, or after a rest, is not counted.

    Args:
        charged: steps are charged for what they take. Otherwise the heap keeps all that they free, and nothing is
            measured.
    """

    def __init__(self, charged: bool) -> None:
        self._charged = charged
        self._keeping = not charged
        keep_freed(self._keeping)
        self._probe = HeapProbe()
        self._tokens = self._rows = 0
        self._rest_floor = self._probe.floor_bytes
        self._first = True

    def start_step(self, tokens: int, rows: int) -> None:
        """The forward of a step with so many tokens of so many requests comes next."""
        self._tokens, self._rows = tokens, rows
        if tokens and self._charged and not self._keeping:
            self._probe.restart()

    def finish_step(self, keep_bytes: int = 0) -> list[ActivationSample]:
        """What the step that was started last took; nothing where none has run but the very first, or none is
        charged. From now on the heap may keep so much of what steps free, which is faster than giving every large
        buffer back at once and takes a few times the memory: nothing can be learned from the peaks of such steps."""
        tokens, self._tokens = self._tokens, 0
        if not self._charged:
            return []
        if self._keeping and not keep_bytes:
            self._probe.trim()
        samples = self._sample(tokens, keep_bytes) if tokens else []
        if self._keeping != (keep_bytes > 0):
            self._keeping = keep_bytes > 0
            keep_freed(self._keeping)
        return samples

    def _sample(self, tokens: int, keep_bytes: int) -> list[ActivationSample]:
        if self._first:  # libraries allocate what they keep for good: it would count as the step's
            self._first = False
            self.rest()
            return []
        use = self._probe.read()
        kept = use.held_bytes
        if kept > max(keep_bytes, _LEFT_BYTES):
            self._probe.trim()
            kept = 0
        left = max(0, self._probe.floor_bytes - self._rest_floor)
        peak = None if self._keeping else use.peak_bytes
        if keep_bytes:
            return [ActivationSample(tokens, self._rows, peak, left, kept)]
        return [ActivationSample(tokens, self._rows, peak, left + kept)]

    def rest(self) -> None:
        """Give back what past steps left; what cannot be given back is not counted as theirs any more."""
        self._probe.trim()
        self._rest_floor = self._probe.floor_bytes
