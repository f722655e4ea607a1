"""The elastic scheduler, writing down what each step computed and how long it took: the step-time model's food."""

import math
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput

from replicas.elastic_scheduler import ElasticScheduler
from replicas.measured_scheduler import step_work
from replicas.step_time import StepWork

_KEY = "step_records"
_FORMAT = struct.Struct("<ddqdqd")
"""Beginning and end in seconds, then StepWork's fields."""
_PAUSE_S = 0.05
"""A step that begins so long after the end of the one before follows an idle engine, not that step."""


def recorded(path: Path) -> Callable[[VllmConfig], None]:
    """Makes an engine append its steps to ``path``; for Instruments.prepare."""
    path.touch()

    def prepare(config: VllmConfig) -> None:
        config.scheduler_config.scheduler_cls = f"{__name__}.{RecordedScheduler.__name__}"
        config.additional_config = {_KEY: str(path)}

    return prepare


def read_steps(path: Path) -> list[tuple[float, StepWork, float]]:
    """(beginning, work, seconds) of each step, beginnings on the machine's monotonic clock. A step lasts until the
    next one
    begins, unless the engine was idle between them."""
    records = list(_records(path.read_bytes()))
    nexts = [*(began_s for began_s, _ended_s, _work in records[1:]), math.inf][: len(records)]
    return [
        (began_s, work, (next_s if next_s - ended_s < _PAUSE_S else ended_s) - began_s)
        for (began_s, ended_s, work), next_s in zip(records, nexts, strict=True)
    ]


def _records(data: bytes) -> Iterator[tuple[float, float, StepWork]]:
    for began_s, ended_s, rows, kv_tokens, tokens, pairs in _FORMAT.iter_unpack(data):
        yield began_s, ended_s, StepWork(rows, kv_tokens, tokens, pairs)


class RecordedScheduler(ElasticScheduler):
    """Its steps run one after the other, as vLLM's do on a CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = self.vllm_config.additional_config
        assert isinstance(settings, dict)
        self._file = Path(settings[_KEY]).open("ab", buffering=0)  # noqa: SIM115  # open as long as the engine lives
        self._began_s = 0.0
        self._work = StepWork()

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self._began_s = time.monotonic()
        output = super().schedule(throttle_prefills)
        self._work = step_work(output, self.requests)
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().update_from_output(*args, **kwargs)
        work = self._work
        if work.rows or work.tokens:
            record = (self._began_s, time.monotonic(), work.rows, work.kv_tokens, work.tokens, work.pairs)
            self._file.write(_FORMAT.pack(*record))
        return outputs
