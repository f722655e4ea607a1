"""Schedulers that write down how preempted requests come back. vLLM loads them by name in its engine's process, and the
test reads the file that the environment names."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from replicas.elastic_scheduler import ElasticAsyncScheduler, ElasticScheduler
from replicas.local_engine import Instruments
from tests.unit.replicas.always_pays import AlwaysPays

VARIABLE = "ELLM_TEST_RESUMPTIONS"


@dataclass(frozen=True)
class Resumption:
    """A preempted request runs again: of its tokens, ``prompt`` in its prompt, ``had`` were computed when it lost its
    blocks, ``found`` are there now, and its first step computes ``computes`` more."""

    prompt: int
    had: int
    found: int
    computes: int


def recording() -> Instruments:
    """For ``local_engine``: its scheduler writes resumptions down, and copies whatever that costs."""

    def prepare(config: VllmConfig) -> None:
        name = "RecordingAsync" if config.scheduler_config.async_scheduling else "Recording"
        config.scheduler_config.scheduler_cls = f"{__name__}.{name}"

    return Instruments(prepare=prepare)


def resumptions(file: Path) -> list[Resumption]:
    """All that was written down so far."""
    return [Resumption(**json.loads(line)) for line in file.read_text().splitlines()]


class _Recording(ElasticScheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._had: dict[str, int] = {}
        self._file = open(os.environ[VARIABLE], "a", buffering=1)  # noqa: SIM115 - as long as the engine

    def about_to_preempt(self, request: Request) -> None:
        self._had[request.request_id] = request.num_computed_tokens
        super().about_to_preempt(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if (host := self._elastic_connector.host) is not None:
            host.traffic.break_even = AlwaysPays(1, self.block_size)
        output = super().schedule(throttle_prefills)
        cached = output.scheduled_cached_reqs
        for request_id, found in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if request_id in cached.resumed_req_ids and request_id in self._had:
                resumption = Resumption(
                    prompt=self.requests[request_id].num_prompt_tokens,
                    had=self._had.pop(request_id),
                    found=found,
                    computes=output.num_scheduled_tokens[request_id],
                )
                self._file.write(json.dumps(asdict(resumption)) + "\n")
        return output


class Recording(_Recording):
    """For synchronous scheduling."""


class RecordingAsync(_Recording, ElasticAsyncScheduler):
    """For asynchronous scheduling."""
