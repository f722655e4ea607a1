"""The elastic scheduler with a clock that stands still while its process is stopped.

Engines are stopped outside their turns. By an ordinary clock every request would then have waited for the turns of all
others too, and the engine would act on objectives that its own clock says are far from missed.
"""

import threading
import time
from typing import Any

from vllm.config import VllmConfig

from replicas.elastic_scheduler import ElasticScheduler

_TICK_S = 0.01
_LONGEST_TICK_S = 0.1
"""A longer one was a stop; turns of others are several times as long."""


class RunningClock:
    """Seconds in which this process ran, to a tenth of a second a stop."""

    def __init__(self) -> None:
        self._total_s = 0.0
        threading.Thread(target=self._tick, daemon=True).start()

    def now(self) -> float:
        return self._total_s

    def _tick(self) -> None:
        last_s = time.monotonic()
        while True:
            time.sleep(_TICK_S)
            now_s = time.monotonic()
            self._total_s += min(now_s - last_s, _LONGEST_TICK_S)
            last_s = now_s


class RunningElasticScheduler(ElasticScheduler):
    """See the module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._running_clock = RunningClock()

    def now_s(self) -> float:
        return self._running_clock.now()


def on_running_clock(config: VllmConfig) -> None:
    """Gives an elastic engine this scheduler; for Instruments.prepare."""
    if str(config.scheduler_config.scheduler_cls).endswith(f".{ElasticScheduler.__name__}"):
        config.scheduler_config.scheduler_cls = f"{__name__}.{RunningElasticScheduler.__name__}"
