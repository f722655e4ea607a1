"""What the activations of an engine's steps cost its lease, and how many tokens of a step the lease allows.

A step has two peaks: the forward, by its tokens, and the logits, by the requests that sample (rows). They do not
overlap, so a step costs the larger one.

    kept     the heaps keep what steps take: fastest, a few times the memory, for a lease with room to spare
    exact    every large buffer goes back at once: for a tight lease; what a step takes is known before it runs.
             The first steps are exact, because the estimate is learned from such steps
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from replicas.activation_profile import ActivationProfile

_KEPT_OVER_EXACT = 4
"""Upper estimate of what the heap keeps of a step, over its exact peak: 2.1 to 3.7 were measured."""
_CALM_S = 2.0
"""The lease must have room for kept activations for so long before they are kept again."""


@dataclass(frozen=True)
class ActivationSample:
    """What one step took on one worker: its tokens, the requests in it, whether the heap kept freed buffers, the peak
    in the step, and what the heap holds after it. An exact step's peak is on top of what it found."""

    tokens: int
    rows: int
    kept: bool
    peak_bytes: int
    held_bytes: int


@dataclass(frozen=True)
class StepAllowance:
    """How the next step may run: at most so many tokens, which take at most so many bytes; with the heaps trimmed
    before it; keeping what it takes."""

    tokens: int
    charged_bytes: int
    trim: bool
    keep: bool


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
        self._keep = False
        self._tight_at: float | None = None
        self._largest_kept = 0
        # Of the last two steps that were kept: a step is measured when the next one runs. Of the last exact one alone:
        # what it took is back before the next one starts.
        self._unmeasured: deque[int] = deque([0, 0], maxlen=2)
        self.held_bytes = 0
        """Measured after the last step that was reported; on the worker that reported last, times the ranks."""

    @property
    def charged_bytes(self) -> int:
        """What steps so far can hold now: measured, or estimated where that has not come back yet."""
        return max(self.held_bytes, *self._unmeasured)

    def bytes_for(self, tokens: int, rows: int) -> int:
        """Upper estimate for an exact step."""
        return self._ranks * max(self._forward.bytes_for(tokens), self._logits.bytes_for(rows))

    def allow(
        self, room: Callable[[int], int], spare_bytes: int, wanted: int, least: int, rows: int, now: float
    ) -> StepAllowance:
        """How a step that could compute ``wanted`` tokens of ``rows`` requests may run; ``least`` is always allowed.

        Args:
            room: bytes that the lease leaves beside the KV memory that a step of so many tokens needs; not more for
                more tokens.
            spare_bytes: what it leaves beside all KV memory that is mapped or wanted.
        """
        wanted = max(wanted, least)
        left = self.charged_bytes if self._keep else self.held_bytes
        kept_bytes = max(left, _KEPT_OVER_EXACT * self.bytes_for(wanted, rows))
        if kept_bytes > spare_bytes:
            self._tight_at = now
        calm = self._forward.largest_tokens > 0 and (self._tight_at is None or now - self._tight_at >= _CALM_S)
        if calm or (self._keep and kept_bytes <= spare_bytes):
            self._keep = True
            return StepAllowance(wanted, kept_bytes, trim=False, keep=True)
        trim = self._keep
        self._keep = False
        if trim:
            self.on_trim()
        tokens = self._most_tokens(room, least, wanted, rows)
        return StepAllowance(tokens, self._exact_bytes(tokens, rows), trim, keep=False)

    def cut(self, allowance: StepAllowance, room_bytes: int, least: int, rows: int) -> StepAllowance:
        """The same step with no more tokens than fit ``room_bytes``, but for ``least``. A kept step stays as it is."""
        if allowance.keep or allowance.charged_bytes <= room_bytes:
            return allowance
        tokens = self._most_tokens(lambda _: room_bytes, least, allowance.tokens, rows)
        return replace(allowance, tokens=tokens, charged_bytes=self._exact_bytes(tokens, rows))

    def _exact_bytes(self, tokens: int, rows: int) -> int:
        """What an exact step may hold: its own, and what steps before it have left."""
        return self.held_bytes + self.bytes_for(tokens, rows)

    def _most_tokens(self, room: Callable[[int], int], least: int, most: int, rows: int) -> int:
        """The largest step from ``least`` to ``most`` tokens that finds room; ``least`` where none does."""
        low, high = least, most
        while low < high:
            middle = (low + high + 1) // 2
            if self._exact_bytes(middle, rows) <= room(middle):
                low = middle
            else:
                high = middle - 1
        return low

    def on_step(self, tokens: int, rows: int) -> None:
        """A step was scheduled."""
        expected = self.bytes_for(tokens, rows)
        if self._keep:
            # What a larger step has left is enough for a smaller one.
            expected = 0 if expected <= self._largest_kept else _KEPT_OVER_EXACT * expected
            self._largest_kept = max(self._largest_kept, expected // _KEPT_OVER_EXACT)
        else:
            self._unmeasured.append(0)
            expected += self.held_bytes
        self._unmeasured.append(expected)

    def on_trim(self) -> None:
        """The next step starts with trimmed heaps."""
        self.held_bytes = self._largest_kept = 0
        self._unmeasured.extend([0, 0])

    def observe(self, sample: ActivationSample) -> None:
        """Learn from a step. The peak of an exact one belongs to the curve that expected more; a step of decodes alone
        is all logits."""
        if sample.kept != self._keep:
            return  # a trim has come between
        self.held_bytes = self._ranks * sample.held_bytes
        if sample.kept:
            return
        expected_logits = self._logits.bytes_for(sample.rows)
        if sample.rows and (sample.tokens == sample.rows or self._forward.bytes_for(sample.tokens) < expected_logits):
            self._logits.observe(sample.rows, sample.peak_bytes)
        else:
            self._forward.observe(sample.tokens, sample.peak_bytes)
