"""What the activations of an engine's steps cost its lease, and how many tokens of a step the lease allows.

A step has two peaks: the forward, by its tokens, and the logits, by the requests that sample (rows). They do not
overlap, so a step costs the larger one. On top comes what earlier steps have left that could not be given back.
"""

from collections.abc import Callable
from dataclasses import dataclass

from replicas.activation_profile import ActivationProfile


@dataclass(frozen=True)
class ActivationSample:
    """What one step took on one worker: its tokens, the requests in it, the peak on top of what it found, and what is
    held after it since the last rest."""

    tokens: int
    rows: int
    peak_bytes: int
    held_bytes: int


@dataclass(frozen=True)
class StepAllowance:
    """How the next step may run: at most so many tokens, which take at most so many bytes."""

    tokens: int
    charged_bytes: int


class ActivationLedger:
    """Bytes over all ranks. Lives in the scheduler's process.

    Args:
        token_bytes: a worker's activation bytes of a token, before any was measured.
        row_bytes: a worker's bytes of the logits of one request, likewise.
    """

    def __init__(self, token_bytes: int, row_bytes: int, ranks: int) -> None:
        self._forward = ActivationProfile(token_bytes)
        self._logits = ActivationProfile(row_bytes)
        self._ranks = ranks
        self._expected = 0
        self.held_bytes = 0
        """Measured after the last step that was reported; on the worker that reported last, times the ranks."""

    @property
    def charged_bytes(self) -> int:
        """What the newest step can hold."""
        return self.held_bytes + self._expected

    def bytes_for(self, tokens: int, rows: int) -> int:
        """Upper estimate for a step."""
        return self._ranks * max(self._forward.bytes_for(tokens), self._logits.bytes_for(rows))

    def allow(self, room: Callable[[int], int], least: int, most: int, rows: int) -> StepAllowance:
        """The largest step, of ``least`` to ``most`` tokens of ``rows`` requests, that finds room; at least the former.

        room: bytes that the lease leaves beside the KV memory of a step of so many tokens; not more for more tokens.
        """
        low, high = least, max(least, most)
        while low < high:
            middle = (low + high + 1) // 2
            if self.held_bytes + self.bytes_for(middle, rows) <= room(middle):
                low = middle
            else:
                high = middle - 1
        return StepAllowance(low, self.held_bytes + self.bytes_for(low, rows))

    def on_step(self, tokens: int, rows: int) -> None:
        """A step was scheduled."""
        self._expected = self.bytes_for(tokens, rows) if tokens else 0

    def on_rest(self) -> None:
        """No step runs, and the next one starts with trimmed heaps."""
        self.held_bytes = self._expected = 0

    def observe(self, sample: ActivationSample) -> None:
        """Learn from a step. Its peak belongs to the curve that expected more; decodes alone are all logits."""
        self.held_bytes = self._ranks * sample.held_bytes
        expected_logits = self._logits.bytes_for(sample.rows)
        if sample.rows and (sample.tokens == sample.rows or self._forward.bytes_for(sample.tokens) < expected_logits):
            self._logits.observe(sample.rows, sample.peak_bytes)
        else:
            self._forward.observe(sample.tokens, sample.peak_bytes)
