"""What a worker's steps take of its heap, measured in the worker. For engines that compute on the CPU."""

from memory_agent.heap import HeapProbe, keep_freed
from replicas.activation_ledger import ActivationSample

_LEFT_BYTES = 1 << 20
"""A step that may keep nothing and leaves more than this on the heap has it trimmed, so that the next one finds nothing
there to reuse: it takes what it needs, and what is charged for it is what it takes."""
_LASTING_BYTES = 512 << 10
"""A step that leaves so much more than the one before was one of the first of its kind: libraries prepared something
for good, which took a few times the memory of the step itself, and will not again."""


class ActivationMeter:
    """Measures from the start of one step to the start of the next, so that sampling is part of the step.

    Made before the first step, when weights are loaded. What the process holds then is not counted, nor what a trim of
    the heap does not return.

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
        self._first = True

    def start_step(self, tokens: int, rows: int) -> None:
        """The forward of a step with so many tokens of so many requests comes next."""
        self._tokens, self._rows = tokens, rows
        if tokens and self._charged and not self._keeping:
            self._probe.restart()

    def make_room(self, tokens: int, rows: int, step_bytes: int) -> None:
        """What the heap keeps was settled by ``finish_step``, and steps are charged for it beside their own."""

    def finish_step(self, keep_bytes: int = 0) -> list[ActivationSample]:
        """What the step that was started last took; nothing where none has run but the very first, or none is
        charged. From now on the heap may keep so much of what steps free, which is faster than giving every large
        buffer back at once and takes a few times the memory: such steps show no peak, nor do those that left something
        for good."""
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
        floor_bytes, use = self._probe.floor_bytes, self._probe.read()
        kept_bytes = use.held_bytes
        if kept_bytes > max(keep_bytes, _LEFT_BYTES):
            self._probe.trim()
            kept_bytes = 0
        lasting = self._probe.floor_bytes - floor_bytes > _LASTING_BYTES
        peak_bytes = None if self._keeping or lasting else use.peak_bytes
        return [ActivationSample(tokens, self._rows, peak_bytes, kept_bytes)]

    def rest(self) -> None:
        """Give back what past steps left."""
        self._probe.trim()
