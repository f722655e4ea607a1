"""The time of a run: what requests are due by and answers are measured with."""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds from any start. One that stands still while its target is stopped measures the target alone."""

    def now(self) -> float: ...

    async def sleep_until(self, at_s: float) -> None:
        """Return when ``now()`` has reached ``at_s``; at once where it has."""
        ...


class WallClock:
    """The machine's time."""

    def now(self) -> float:
        return time.perf_counter()

    async def sleep_until(self, at_s: float) -> None:
        if (left_s := at_s - self.now()) > 0:
            await asyncio.sleep(left_s)
