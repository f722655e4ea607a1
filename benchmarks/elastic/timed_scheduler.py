"""vLLM's scheduler and the elastic one, each timed in the engine's process.

Only processor time of the scheduling thread counts, so that being stopped or crowded out does not.
"""

import mmap
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from replicas.elastic_scheduler import ElasticAsyncScheduler, ElasticScheduler

_KEY = "scheduler_times"
_FORMAT = struct.Struct("<QQ")


@dataclass(frozen=True)
class SchedulerTimes:
    """Since the engine's start: steps that computed something, and the scheduler's nanoseconds in all of them."""

    steps: int
    nanoseconds: int

    @classmethod
    def read(cls, path: Path) -> "SchedulerTimes":
        return cls(*_FORMAT.unpack(path.read_bytes()))

    def us_a_step_since(self, before: "SchedulerTimes") -> float:
        return (self.nanoseconds - before.nanoseconds) / (self.steps - before.steps) / 1000


def timed(path: Path) -> Callable[[VllmConfig], None]:
    """Makes an engine write its SchedulerTimes to the new file ``path``; for Instruments.prepare."""
    path.write_bytes(bytes(_FORMAT.size))

    def prepare(config: VllmConfig) -> None:
        elastic = config.scheduler_config.scheduler_cls is not None
        chosen = _TIMED[elastic, bool(config.scheduler_config.async_scheduling)]
        config.scheduler_config.scheduler_cls = f"{__name__}.{chosen.__name__}"
        config.additional_config = {_KEY: str(path)}

    return prepare


class _Timed(Scheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = self.vllm_config.additional_config
        assert isinstance(settings, dict)
        with Path(settings[_KEY]).open("r+b") as file:
            self._written = mmap.mmap(file.fileno(), _FORMAT.size)
        self._steps = self._nanoseconds = 0

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        started = time.thread_time_ns()
        output = super().schedule(throttle_prefills)
        self._nanoseconds += time.thread_time_ns() - started
        self._steps += output.total_num_scheduled_tokens > 0
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        started = time.thread_time_ns()
        outputs = super().update_from_output(*args, **kwargs)
        self._nanoseconds += time.thread_time_ns() - started
        _FORMAT.pack_into(self._written, 0, self._steps, self._nanoseconds)
        return outputs


class TimedScheduler(_Timed):
    """vLLM's own."""


class TimedAsyncScheduler(_Timed, AsyncScheduler):
    """vLLM's own, asynchronous."""


class TimedElasticScheduler(_Timed, ElasticScheduler):
    """The elastic one."""


class TimedElasticAsyncScheduler(_Timed, ElasticAsyncScheduler):
    """Likewise, asynchronous."""


_TIMED: Mapping[tuple[bool, bool], type[_Timed]] = {
    (False, False): TimedScheduler,
    (False, True): TimedAsyncScheduler,
    (True, False): TimedElasticScheduler,
    (True, True): TimedElasticAsyncScheduler,
}
"""By whether the engine is elastic, and asynchronous."""
