"""The host buffer's logical size: how much of it admission may use now, scaled by latency as in eLLM.

The buffer lets more prompts in (time to first token falls), and its copies slow the decodes down (time per output token
rises). So, as in eLLM (arXiv 2506.15155): when 3 of the last 5 iterations violated the objective for TPOT, halve; when
3 of 5 violated that for TTFT, double; inside a physical ceiling. Added here, because both happen under overload:

- one kind must be the trouble: at most 1 of the 5 iterations may have violated the other objective;
- a change starts a new window, and no change follows it for a while; one the other way waits longer.

Pure: state and sample in, state out.
"""

from dataclasses import dataclass, replace

from memory_agent.errors import SettingsError

WINDOW = 5
VIOLATIONS = 3
OPPOSED_AT_MOST = 1
FACTOR = 2
PAUSE_S = 1.0
"""No change sooner than this after another."""
REVERSE_PAUSE_S = 10.0
"""No change in the other direction sooner than this after another."""


@dataclass(frozen=True)
class SloSample:
    """Which objectives one iteration violated."""

    ttft: bool = False
    tpot: bool = False


@dataclass(frozen=True)
class LogicalSize:
    """The size and what led to it, in any unit (slots, bytes).

    Attributes:
        size: floor to ceiling, or the ceiling where that is below the floor.
        floor: where halving ends; at least 1, so that doubling leads out again.
        ceiling: the physical size.
        recent: samples since the last change, newest last, at most WINDOW.
        changed_at: time of the last change in seconds, None before the first.
        grew: direction of the last change.
    """

    size: int
    floor: int
    ceiling: int
    recent: tuple[SloSample, ...] = ()
    changed_at: float | None = None
    grew: bool = False

    def __post_init__(self) -> None:
        if self.floor < 1 or self.ceiling < 0 or self.size != self._inside(self.size):
            raise SettingsError(
                f"a logical size of {self.size} with floor {self.floor} and ceiling {self.ceiling}: "
                "choose a floor of at least 1 and a size from floor to ceiling"
            )

    def sampled(self, sample: SloSample, now: float) -> "LogicalSize":
        """The state after one more iteration. now: monotonic seconds, never less than before."""
        state = replace(self, recent=(*self.recent, sample)[-WINDOW:])
        ttft, tpot = sum(seen.ttft for seen in state.recent), sum(seen.tpot for seen in state.recent)
        if tpot >= VIOLATIONS and ttft <= OPPOSED_AT_MOST:
            return state._scaled(False, now)
        if ttft >= VIOLATIONS and tpot <= OPPOSED_AT_MOST:
            return state._scaled(True, now)
        return state

    def limited(self, ceiling: int) -> "LogicalSize":
        """The state under another physical ceiling. What that forces on the size counts as no change."""
        size = max(min(self.size, ceiling), min(self.floor, ceiling))
        return replace(self, size=size, ceiling=ceiling)

    def _scaled(self, grow: bool, now: float) -> "LogicalSize":
        size = self._inside(self.size * FACTOR if grow else self.size // FACTOR)
        pause = PAUSE_S if grow == self.grew else REVERSE_PAUSE_S
        if size == self.size or (self.changed_at is not None and now - self.changed_at < pause):
            return self
        return replace(self, size=size, recent=(), changed_at=now, grew=grow)

    def _inside(self, size: int) -> int:
        return min(max(size, self.floor), self.ceiling)
