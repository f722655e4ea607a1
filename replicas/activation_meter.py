"""What a worker's steps take of its heap, measured in the worker. For engines that compute on the CPU."""

from memory_agent.heap import HeapProbe, keep_freed
from replicas.activation_ledger import ActivationSample

_LEFT_BYTES = 1 << 20
"""An exact step that leaves more than this on the heap has found room there that an earlier step had left: the heap is
trimmed, so that the next one takes what it needs and no more."""


class ActivationMeter:
    """Measures from the start of one step to the start of the next, so that sampling is part of the step.

    Made before the first step, when weights are loaded: what the process holds then, or after a trim, is not counted.
    """

    def __init__(self) -> None:
        self._keeps = False
        keep_freed(self._keeps)
        self._probe = HeapProbe()
        self._tokens = self._rows = 0
        self._left = 0
        """What exact steps have left that no trim gave back, since the last ``trim``."""

    def start_step(self, tokens: int, rows: int, keep: bool) -> None:
        """The forward of a step with so many tokens of so many requests comes next. ``keep``: the heap keeps what it
        takes."""
        if keep != self._keeps:
            self._keeps = keep
            keep_freed(keep)
        self._tokens, self._rows = tokens, rows
        if tokens:
            self._probe.restart()

    def finish_step(self) -> list[ActivationSample]:
        """What the step that was started last took; nothing where none has run."""
        tokens, self._tokens = self._tokens, 0
        if not tokens:
            return []
        use = self._probe.read()
        peak, held = use.peak_bytes, use.held_bytes
        if not self._keeps and held > _LEFT_BYTES:
            stays = self._probe.trim()
            self._left += stays
            peak, held = max(0, peak - stays), 0
        if not self._keeps:
            held += self._left
        return [ActivationSample(tokens, self._rows, self._keeps, peak, held)]

    def trim(self) -> None:
        """Give back what past steps left; what cannot be given back is not counted as theirs any more."""
        self._probe.trim()
        self._left = 0
