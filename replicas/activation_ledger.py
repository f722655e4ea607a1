"""What the activations of an engine's steps cost its lease, and how many tokens of a step the lease allows.

A step has two peaks: the forward, by its tokens, and the logits, by the requests that sample (rows). They do not
overlap, so a step costs the larger one. On top comes what the heap may keep of what earlier steps freed, where the
lease has room for it. What libraries keep for good, code and tables for each size of a step, is none of it: like the
rest of the process it is outside the lease.
"""

from collections.abc import Callable
from dataclasses import dataclass

from replicas.activation_profile import ActivationProfile


@dataclass(frozen=True)
class ActivationSample:
    """What one step took on one worker.

    Attributes:
        tokens, rows: of the step; rows are its requests.
        peak_bytes: on top of what it found; None where it found memory to reuse, or something was left for good.
        kept_bytes: what the heap keeps after it, to be reused.
    """

    tokens: int
    rows: int
    peak_bytes: int | None
    kept_bytes: int


@dataclass(frozen=True)
class StepAllowance:
    """How the next step may run: at most so many tokens, which take at most so many bytes. ``keep_bytes`` of these are
    for what the heap may keep of what steps free."""

    tokens: int
    charged_bytes: int
    keep_bytes: int = 0

    def keeping(self, keep_bytes: int) -> "StepAllowance":
        """The same step, with so many bytes for the heap to keep."""
        return StepAllowance(self.tokens, self.charged_bytes - self.keep_bytes + keep_bytes, keep_bytes)


_KEEP_POOLED = 2
"""Times what the steps before have left in a pool: what is known of it is a step or two old."""
_KEEP_FROM, _KEEP_WHILE = 4, 2
"""Steps whose activations the heap must be able to keep before it begins to keep any, and from then on."""


class ActivationLedger:
    """Bytes over all ranks. Lives in the scheduler's process.

    Args:
        token_bytes: a worker's activation bytes of a token, before any was measured.
        row_bytes: a worker's bytes of the logits of one request, likewise.
        pooled: workers give back at once what they may not keep; a heap has to be told before it frees.
    """

    def __init__(self, token_bytes: int, row_bytes: int, ranks: int, pooled: bool = False) -> None:
        self._forward = ActivationProfile(token_bytes)
        self._logits = ActivationProfile(row_bytes)
        self._ranks = ranks
        self._pooled = pooled
        self._expected = 0
        self.held_bytes = 0
        """Kept after the last step that was reported; on the worker that reported last, times the ranks."""
        self.keep_bytes = 0
        """What the heaps may keep of what steps free, since the newest step."""

    @property
    def charged_bytes(self) -> int:
        """What the newest step can hold."""
        return self._expected + self.keep_bytes

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
            if self.bytes_for(middle, rows) <= room(middle):
                low = middle
            else:
                high = middle - 1
        return StepAllowance(low, self.bytes_for(low, rows))

    def keep_in(self, slack_bytes: int, tokens: int, rows: int) -> int:
        """Of ``slack_bytes`` of the lease that nothing else wants now, what the heaps may keep beside steps of
        ``tokens`` of ``rows`` requests: half, or nothing where that is little, or where no step so large was measured
        yet. A pool may keep what steps have left there, which it would take anew for the next one like them."""
        if self._pooled:
            return max(0, min(slack_bytes, _KEEP_POOLED * max(self.held_bytes, self._expected)))
        if tokens > self._forward.largest_tokens or rows > self._logits.largest_tokens:
            return 0
        keep = slack_bytes // 2
        steps = _KEEP_WHILE if self.keep_bytes else _KEEP_FROM
        return keep if keep >= steps * self.bytes_for(tokens, rows) else 0

    def on_step(self, tokens: int, rows: int) -> None:
        """A step was scheduled."""
        self._expected = self.bytes_for(tokens, rows) if tokens else 0

    def on_rest(self) -> None:
        """No step runs, and the next one starts with trimmed heaps."""
        self.held_bytes = self._expected = self.keep_bytes = 0

    def observe(self, sample: ActivationSample) -> None:
        """Learn from a step. Its peak belongs to the curve that expected more; decodes alone are all logits."""
        self.held_bytes = self._ranks * sample.kept_bytes
        if sample.peak_bytes is None:
            return
        expected_logits = self._logits.bytes_for(sample.rows)
        if sample.rows and (sample.tokens == sample.rows or self._forward.bytes_for(sample.tokens) < expected_logits):
            self._logits.observe(sample.rows, sample.peak_bytes)
        else:
            self._forward.observe(sample.tokens, sample.peak_bytes)
