"""What has been done for one model, in lines as ``ellm serve`` prints them, for those who wait for it."""

from collections.abc import Callable
from dataclasses import dataclass, field

Line = tuple[str, float, str]
"""A stage, the seconds since it began, and text."""


@dataclass
class ModelStory:
    """Lines of one model's addition or removal. ``now`` is any monotonic clock, in seconds.

    error: why it failed, after the name of the stage; None while it has not.
    """

    now: Callable[[], float]
    lines: list[Line] = field(default_factory=list)
    error: str | None = None
    _stage: str = ""
    _began_s: float = 0.0

    def say(self, stage: str, text: str) -> None:
        """Add a line, unless it is the last one again."""
        now_s = self.now()
        if stage != self._stage:
            self._stage, self._began_s = stage, now_s
        if not self.lines or (self.lines[-1][0], self.lines[-1][2]) != (stage, text):
            self.lines.append((stage, now_s - self._began_s, text))

    def fail(self, reason: str) -> None:
        """The stage that was spoken of last has failed."""
        self.error = f"{self._stage}: {reason}"
